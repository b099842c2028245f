"""Keys and values that blocks of a Hugging Face model leave for later blocks.

In Gemma 3n and 4 the last blocks have no keys and values of their own. They read those of an
earlier block from a mapping that all blocks of a call get. Here a mapping belongs to one call. What
it must know of earlier calls comes from the cache, where the block that left the keys and values
wrote them, or, in whole sequences without a cache, from the memo of the step.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from offramp.errors import ConfigError
from offramp.models.base import Step

KeysValues = tuple[Tensor, Tensor]
"""Keys and values (B, H, S, Dh) each."""


class SharedKeysValues(MutableMapping[str, KeysValues]):
    """The mapping from which blocks read shared keys and values during one call.

    ``sources`` are the blocks (from 0) that leave keys and values under each name, and ``cache``
    reads what a block wrote.
    """

    def __init__(self, step: Step, owner: object, cache: Any, sources: Mapping[str, int]) -> None:
        self.cache, self.sources = cache, sources
        without_cache = step.cache is None
        self.kept: dict[str, KeysValues] = (
            step.memo.setdefault((owner, "shared"), {}) if without_cache else {}
        )

    def __getitem__(self, name: str) -> KeysValues:
        if name not in self.kept:
            if name not in self.sources or not self.cache.used:
                raise ConfigError(
                    f"step: expected that of the call below, which keeps the keys and values that "
                    f"blocks share ({name}), got one without them"
                )
            self.kept[name] = self.cache.read(self.sources[name])
        return self.kept[name]

    def __setitem__(self, name: str, pair: KeysValues) -> None:
        self.kept[name] = pair

    def __delitem__(self, name: str) -> None:
        del self.kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)
