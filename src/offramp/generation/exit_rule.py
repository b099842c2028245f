"""The rule of an exit: a policy, and the confidence that it reads."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offramp.errors import GenerationError
from offramp.exits.confidence import Confidence, ExitView, confidence_named
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.transfer import read

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("float32"),
    torch.float64: np.dtype("float64"),
}


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """A policy and the confidence measure that it reads."""

    policy: ThresholdPolicy | GainPolicy
    confidence: str = "max_prob"
    fitted: FittedExits = NOTHING_FITTED

    @property
    def measure(self) -> Confidence:
        """The confidence measure of this name."""
        return confidence_named(self.confidence)

    def evaluate(
        self, index: int, view: ExitView, positions: list[int]
    ) -> tuple[list[float], list[bool]]:
        """Return the confidence of each token at the ``index``-th exit, and whether it leaves.

        ``positions`` are used only if the threshold decays: see ``Decay``. A confidence that is
        not a number belongs to a token that cannot be decoded: see ``broken_score``.
        """
        scores = self.measure.score(view)
        if self.confidence == "patience":  # which counts anything
            scores = scores + 0 * view.logits.amax(dim=-1)
        if isinstance(self.policy, GainPolicy):
            confidence, leaving = read(scores, self.policy.leaves(index, view.expected_kl))
            return confidence, [bool(leaves) for leaves in leaving]
        [confidence] = read(scores)
        places = np.asarray(positions) if self.policy.decay else None
        bounds = self.policy.bound(index, _NUMPY[scores.dtype], places)  # in their precision
        bounds = np.broadcast_to(bounds, len(confidence)).tolist()
        return confidence, [score >= bound for score, bound in zip(confidence, bounds, strict=True)]


def broken_score(measure: str, layer: int) -> GenerationError:
    """Return the error of a token whose confidence at an exit is not a number."""
    return GenerationError(
        f"exit layer {layer}: expected {measure} scores that are finite numbers, got nan: "
        "check the weights of the model and its precision"
    )
