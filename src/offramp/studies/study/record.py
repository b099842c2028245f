"""What a run of a study leaves in its folder: ``run.json``, ``timing.json``, ``frontiers.npz``.

The names of stored keys occur only here and in ``frontier``. The folder holds the trained model,
too, which no summary reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offramp.errors import ConfigError
from offramp.files import write_json
from offramp.reading import read_as

FRONTIERS = "frontiers.npz"
_RECORD = "run.json"
_TIMING = "timing.json"
FULL = "full"
"""Name of the full model among the FLOPs and the passes of a run."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One trained model: how it was trained, and its figures on the test text."""

    label: str
    "Label of the recipe for which it was trained first; other studies may share it."
    config: Mapping[str, Any]
    "Everything that the figures depend on."
    train_tokens: int
    test_tokens: int
    exit_ppl: Mapping[int, float]
    "PPL on the test text where every token leaves at that layer."
    flops: Mapping[str, float]
    """FLOPs of a token: in the full model with one head (``full``), and in the cheapest gate of
    each kind (such as ``gain gate``)."""
    left_at_budget: Mapping[int, float] | None
    "Share of tokens that left at each exit when the exits were specialised; None if they weren't."
    validations: Sequence[Mapping[str, Any]]
    "The validations of the training, in order."

    def __post_init__(self) -> None:
        if FULL not in self.flops:
            raise ConfigError(f"flops: expected those of {FULL}, got {', '.join(self.flops)}")

    @property
    def full_flops(self) -> float:
        """FLOPs of a token in the full model with one head."""
        return self.flops[FULL]

    def save(self, folder: Path) -> None:
        """Write run.json."""
        write_json(folder / _RECORD, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "RunRecord":
        """Read run.json. Raises CheckpointError if it is damaged."""
        return read_as(cls, folder / _RECORD)


@dataclass(frozen=True, kw_only=True)
class RunTiming:
    """Seconds that a run took, and its passes over the test text."""

    seconds: Mapping[str, float]
    "Of the parts of the run: train, specialise, evaluate."
    passes: Mapping[str, Sequence[float]]
    """Of a pass at full depth (``full``), and by measure of a pass with each policy of its frontier
    under ``propagate``, but for the two ends, which take no pass of their own."""
    environment: Mapping[str, Any]

    def __post_init__(self) -> None:
        if len(self.passes.get(FULL, ())) != 1:
            raise ConfigError(f"passes: expected one of {FULL}, got {', '.join(self.passes)}")

    @property
    def full_pass(self) -> float:
        """Seconds of a pass at full depth."""
        return self.passes[FULL][0]

    def save(self, folder: Path) -> None:
        """Write timing.json."""
        write_json(folder / _TIMING, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "RunTiming":
        """Read timing.json. Raises CheckpointError if it is damaged."""
        return read_as(cls, folder / _TIMING)
