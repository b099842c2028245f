"""The work of decoding: which parts of a model ran, how often, and for how many tokens at once."""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Work:
    """Counts of calls by their number of tokens; calls at an exit also by the exit's layer.

    The prompts' prefill is not counted.
    """

    blocks: Counter[int] = field(default_factory=Counter)
    "Blocks that ran, by tokens."
    keys_values: Counter[int] = field(default_factory=Counter)
    "Blocks of which only keys and values were projected, by tokens."
    heads: Counter[tuple[int, int]] = field(default_factory=Counter)
    "Logits that were not already computed to evaluate a confidence, by (layer, tokens)."
    evaluations: Counter[tuple[int, int]] = field(default_factory=Counter)
    "Evaluations of an exit's confidence, with the head or gate that it reads, by (layer, tokens)."
    drafts: Counter[tuple[int, int]] = field(default_factory=Counter)
    "Evaluations of the exit that drafts, by (layer, tokens)."

    @property
    def layers_run(self) -> int:
        """Number of blocks that ran, counted for each token."""
        return sum(tokens * count for tokens, count in self.blocks.items())

    def copy(self) -> "Work":
        """Return the counts as they are now."""
        return Work(**{name: Counter(counted) for name, counted in self._counters()})

    def add_since(self, before: "Work", now: "Work") -> None:
        """Add the work that was done between two moments."""
        earlier = dict(before._counters())
        for (name, counted), (_, own) in zip(now._counters(), self._counters(), strict=True):
            own.update(counted - earlier[name])

    def _counters(self) -> list[tuple[str, Counter[Any]]]:
        return [(each.name, getattr(self, each.name)) for each in fields(self)]
