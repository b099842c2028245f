"""The risk that a certificate bounds: the loss of each sequence at each step of a path."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.promise import DEFAULT_BOUND, RISKS
from offramp.errors import ConfigError, CorpusError
from offramp.evaluation.trace import ExitTrace
from offramp.exits.confidence import confidence_named
from offramp.exits.policy import ThresholdPolicy

ThresholdPath = tuple[tuple[float, ...], ...]
"""Threshold vectors, one number for each exit but the last, from conservative to bold."""


def token_losses(
    trace: ExitTrace, risk: str, *, bound: float = DEFAULT_BOUND
) -> NDArray[np.float64]:
    """Return (E, N) losses in [0, 1] of each token at each exit, relative to the last layer.

    ``disagreement`` is 1 if the most likely token differs from the last layer's, else 0.
    ``nll-gap`` is the NLL of the target minus that of the last layer, clipped to [0, ``bound``]
    nats and divided by ``bound``. Negative gaps count as 0, so the mean loss is never less than
    the mean gap.
    """
    if trace.exit_layers[-1] != trace.num_layers:
        raise ConfigError(
            f"exit layers: expected the last layer, {trace.num_layers}, among the trace's, "
            f"got {trace.exit_layers}"
        )
    if risk == "disagreement":
        differs: NDArray[np.float64] = (trace.argmax != trace.argmax[-1]).astype(np.float64)
        return differs
    if risk != "nll-gap":
        raise ConfigError(f"risk: expected one of {', '.join(RISKS)}, got {risk!r}")
    if not (math.isfinite(bound) and bound > 0):
        raise ConfigError(f"bound: expected a number of nats above 0, got {bound}")
    nll = np.minimum(trace.nll.astype(np.float64), 1e300)
    gap: NDArray[np.float64] = np.clip(nll - nll[-1], 0.0, bound) / bound
    return gap


def whole_sequences(trace: ExitTrace) -> ExitTrace:
    """Return the trace of the longest windows only; a shorter last window is not comparable.

    Raises CorpusError if the longest windows have fewer than 2 tokens.
    """
    if trace.sequence is None:
        raise ConfigError("trace: expected one with sequence numbers, got one without")
    if not trace.num_tokens:
        raise CorpusError("corpus: expected at least one sequence, got none")
    _, index, lengths = np.unique(trace.sequence, return_inverse=True, return_counts=True)
    longest = int(lengths.max())
    if longest < 2:
        raise CorpusError(f"corpus: expected sequences of at least 2 tokens, got {longest}")
    whole = lengths[index] == longest
    return trace if whole.all() else trace.tokens(whole)


def sequence_losses(
    trace: ExitTrace,
    path: ThresholdPath,
    *,
    confidence: str,
    risk: str,
    bound: float = DEFAULT_BOUND,
) -> NDArray[np.float64]:
    """Return (n, steps): the mean loss over the tokens of each sequence at each step."""
    assert trace.sequence is not None, "a trace of whole_sequences"
    losses = token_losses(trace, risk, bound=bound)
    scores = trace.scores(confidence)[:-1]
    _, index, lengths = np.unique(trace.sequence, return_inverse=True, return_counts=True)
    columns = []
    for thresholds in path:
        here = ThresholdPolicy.of(thresholds, len(trace.exit_layers)).leaving(scores)
        lost = sum(leaving * loss for leaving, loss in zip(here, losses, strict=True))
        columns.append(np.bincount(index, weights=lost) / lengths)
    return np.stack(columns, axis=1)


def threshold_path(confidence: str, num_exits: int, *, steps: int = 100) -> ThresholdPath:
    """Return the default path of a measure, on which all exits have the same threshold.

    It does not depend on the scores of a text. For ``gain``, prices go from 0.001 to 3 nats; for
    ``patience``, the thresholds go from the number of exits down to 2; for ``saturation``, 1 - s
    goes from 1e-4 to 1; for all others, 1 - s goes from 0.001 to 0.9. All but ``patience`` are
    spaced geometrically.
    """
    confidence_named(confidence)
    if num_exits < 2:
        raise ConfigError(
            f"exit layers: expected at least one before the last, got {num_exits - 1}"
        )
    if steps < 1:
        raise ConfigError(f"steps: expected at least 1, got {steps}")
    if confidence == "patience":
        levels = np.arange(num_exits - 1, 0, -1, dtype=np.float64)
    elif confidence == "gain":
        levels = -np.geomspace(1e-3, 3.0, steps)
    elif confidence == "saturation":
        levels = 1.0 - np.geomspace(1e-4, 1.0, steps)
    else:
        levels = 1.0 - np.geomspace(1e-3, 0.9, steps)
    return tuple((float(level),) * (num_exits - 1) for level in levels)


def check_path(path: Sequence[Sequence[float]], num_exits: int) -> ThresholdPath:
    """Return the path as tuples. Raises ConfigError if a threshold rises along the path."""
    if not path:
        raise ConfigError("path: expected at least one step, got none")
    checked = tuple(ThresholdPolicy.of(list(step), num_exits).thresholds for step in path)
    for before, after in pairwise(checked):
        if any(new > old for old, new in zip(before, after, strict=True)):
            raise ConfigError(
                f"path: expected thresholds from conservative to bold, got {before}, then {after}"
            )
    return checked
