"""The confidence that decides if the user names none, and what a threshold then means.

It is ``gain`` if every exit before the last layer has its gate: a gate costs less than a block, and
``max_prob`` needs an LM head at each exit. So that thresholds from 0 to 1 keep a meaning, a
threshold is then a share of probability: at 0.9 a token leaves if its exit is expected to give the
next token 90% of the probability that the last layer gives it. The share is exp(-KL(p_L || p_e)), a
geometric mean, so 0.9 is the threshold ln 0.9 = -0.105 nats of ``gain``. Below 0 a threshold is in
nats, as it is with ``gain`` by name, and above 1 no token leaves.
"""

import math
from collections.abc import Sequence

from offramp.exits.gate import FittedExits

Threshold = float | tuple[float, ...]


def default_confidence(fitted: FittedExits, exit_layers: Sequence[int]) -> str:
    """Return the measure that decides if the user names none: ``gain`` if it was fitted."""
    early = set(exit_layers[:-1])
    return "gain" if early and early <= set(fitted.gates.get("gain", ())) else "max_prob"


def confidence_and_threshold(
    confidence: str | None,
    threshold: Threshold,
    *,
    fitted: FittedExits,
    exit_layers: Sequence[int],
) -> tuple[str, Threshold]:
    """Return the measure that decides, and the threshold in its unit.

    ``confidence`` is what the user named, or None. A threshold of a named measure is in the unit
    of that measure already.
    """
    if confidence is not None:
        return confidence, threshold
    name = default_confidence(fitted, exit_layers)
    if name != "gain":
        return name, threshold
    if isinstance(threshold, Sequence):
        return name, tuple(in_nats(each) for each in threshold)
    return name, in_nats(threshold)


def in_nats(threshold: float) -> float:
    """Return the threshold of ``gain`` for a share of probability from 0 to 1."""
    if not 0 <= threshold <= 1:
        return threshold
    return math.log(threshold) if threshold else -math.inf
