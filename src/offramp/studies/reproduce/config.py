"""The options of ``offramp reproduce``. Imports no PyTorch."""

from dataclasses import dataclass

from offramp.errors import ConfigError

SEEDS = {"pangram": 5}
TEXT_SEEDS = 3
QUICK_SEEDS = 2


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """The options of ``offramp reproduce``."""

    corpus: str | None = None
    "pangram, python-docs, or a text file or folder; without it pangram, then python-docs."
    seeds: int | None = None
    "Seeds of each method (default: 5 on the pangram, 3 on text)."
    quick: bool = False
    "The pangram only, with 2 seeds: the same protocol in about a minute."

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise ConfigError(f"seeds: expected at least 1, got {self.seeds}")

    def plan(self) -> list[tuple[str, int]]:
        """(corpus, number of seeds) in the order in which they run."""
        default = ["pangram"] if self.quick else ["pangram", "python-docs"]
        names = default if self.corpus is None else [self.corpus]
        usual = QUICK_SEEDS if self.quick else None
        return [(name, self.seeds or usual or SEEDS.get(name, TEXT_SEEDS)) for name in names]
