"""The options of ``offramp reproduce``. Imports no PyTorch."""

import math
from dataclasses import dataclass

from offramp.errors import ConfigError

SEEDS = {"pangram": 8}
"""Seeds by default: as many as take 8 minutes on 2 cores, with the text and the installation."""
TEXT_SEEDS = 4
QUICK_SEEDS = 2
RUN_SECONDS = 8.9
"""Processor time of one training run of the protocol, where every core is busy."""
REPORT_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """The options of ``offramp reproduce``."""

    corpus: str | None = None
    "pangram, python-docs, or a text file or folder; without it pangram, then python-docs."
    seeds: int | None = None
    "Seeds of each method (default: 8 on the pangram, 4 on text); fewer than 3 decide nothing."
    quick: bool = False
    "The pangram only, with 2 seeds: the same protocol in about a minute, without a verdict."
    full: bool = False
    "As many seeds as give each finding a power of 0.9 for effects of 10%."
    alphas: tuple[float, ...] = ()
    "Train these alphas too, such as 0.1,0.9."
    thresholds: tuple[float, ...] = ()
    "Report every method that routes at these thresholds too, such as 0.5,0.9."

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise ConfigError(f"seeds: expected at least 1, got {self.seeds}")
        if self.full and (self.quick or self.seeds is not None):
            other = "quick" if self.quick else f"seeds {self.seeds}"
            raise ConfigError(f"full: expected neither quick nor seeds with it, got {other}")
        _check_numbers("alphas", self.alphas)
        _check_numbers("thresholds", self.thresholds)

    @property
    def names(self) -> list[str]:
        """The corpora in the order in which they run."""
        if self.corpus is not None:
            return [self.corpus]
        return ["pangram"] if self.quick else ["pangram", "python-docs"]

    def plan(self) -> list[tuple[str, int]]:
        """Return (corpus, number of seeds) in the order in which they run."""
        if self.full:
            from offramp.studies.reproduce.power import required_seeds  # imports SciPy

            return [(name, required_seeds(name)) for name in self.names]
        usual = QUICK_SEEDS if self.quick else None
        return [(name, self.seeds or usual or SEEDS.get(name, TEXT_SEEDS)) for name in self.names]


def _check_numbers(name: str, numbers: tuple[float, ...]) -> None:
    for number in numbers:
        if not (math.isfinite(number) and 0.0 <= number <= 1.0):
            raise ConfigError(f"{name}: expected numbers from 0 to 1, got {number}")
    twice = [number for number in numbers if numbers.count(number) > 1]
    if twice:
        raise ConfigError(f"{name}: expected each number once, got {twice[0]} twice")


def minutes_text(runs: int, jobs: int) -> str:
    """Return in words how long that many training runs take with ``jobs`` processes."""
    seconds = runs * RUN_SECONDS / jobs + REPORT_SECONDS
    minutes = max(1, round(seconds / 60.0))
    return f"about {minutes} {'minute' if minutes == 1 else 'minutes'} on {jobs} free " + (
        "core" if jobs == 1 else "cores"
    )
