"""What a run of a study leaves in its folder: ``run.json``, ``timing.json``, ``frontiers.npz``.

The names of stored keys occur only here and in ``frontier``. The folder holds the trained model,
too, which no summary reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.files import parsing, read_json, write_json

FRONTIERS = "frontiers.npz"
_RECORD = "run.json"
_TIMING = "timing.json"
_FULL = "full"
_GATE = " gate"


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
    full_flops: float
    "FLOPs of a token in the full model with one head."
    gate_flops: Mapping[str, float]
    "FLOPs of a token in the cheapest gate, by the gates' kind."
    left_at_budget: Mapping[int, float] | None
    "Share of tokens that left at each exit when the exits were specialised; None if they weren't."
    validations: Sequence[Mapping[str, Any]]
    "The validations of the training, in order."

    def save(self, folder: Path) -> None:
        """Write run.json."""
        flops = {_FULL: self.full_flops}
        flops |= {f"{kind}{_GATE}": cost for kind, cost in self.gate_flops.items()}
        write_json(
            folder / _RECORD,
            {
                "label": self.label,
                "config": self.config,
                "train_tokens": self.train_tokens,
                "test_tokens": self.test_tokens,
                "exit_ppl": self.exit_ppl,
                "flops": flops,
                "left_at_budget": self.left_at_budget,
                "validations": self.validations,
            },
        )

    @classmethod
    def load(cls, folder: Path) -> "RunRecord":
        """Read run.json. Raises CheckpointError if it is damaged."""
        stored = read_json(folder / _RECORD)
        with parsing(folder / _RECORD, "the record of a run of offramp study"):
            gates = {name: float(cost) for name, cost in stored["flops"].items() if name != _FULL}
            left = stored["left_at_budget"]
            return cls(
                label=str(stored["label"]),
                config={**stored["config"]},
                train_tokens=int(stored["train_tokens"]),
                test_tokens=int(stored["test_tokens"]),
                exit_ppl={int(layer): float(ppl) for layer, ppl in stored["exit_ppl"].items()},
                full_flops=float(stored["flops"][_FULL]),
                gate_flops={name.removesuffix(_GATE): cost for name, cost in gates.items()},
                left_at_budget=left and {int(layer): float(share) for layer, share in left.items()},
                validations=[{**validation} for validation in stored["validations"]],
            )


@dataclass(frozen=True, kw_only=True)
class RunTiming:
    """Seconds that a run took, and its passes over the test text."""

    seconds: Mapping[str, float]
    "Of the parts of the run: train, specialise, evaluate."
    full_pass: float
    "Of a pass at full depth."
    routed_passes: Mapping[str, Sequence[float]]
    """By measure, of a pass with each policy of its frontier under ``propagate``, but for the two
    ends, which take no pass of their own."""
    environment: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write timing.json."""
        passes = {_FULL: [self.full_pass], **self.routed_passes}
        content = {"seconds": self.seconds, "passes": passes, "environment": self.environment}
        write_json(folder / _TIMING, content)

    @classmethod
    def load(cls, folder: Path) -> "RunTiming":
        """Read timing.json. Raises CheckpointError if it is damaged."""
        stored = read_json(folder / _TIMING)
        with parsing(folder / _TIMING, "the times of a run of offramp study"):
            passes = {name: [float(took) for took in of] for name, of in stored["passes"].items()}
            (full,) = passes.pop(_FULL)
            return cls(
                seconds={part: float(took) for part, took in stored["seconds"].items()},
                full_pass=full,
                routed_passes=passes,
                environment={**stored["environment"]},
            )
