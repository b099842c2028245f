"""What a certificate promises about: the loss of each sequence at each step of a path."""

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
    """(E, N) in [0, 1]: what a token loses at each exit against the last one.

    ``disagreement``: 1 where the first choice differs from the last layer's. ``nll-gap``: by how
    many nats the target is less likely than to the last layer, from 0 to ``bound``, over bound.
    Tokens that an exit predicts better lose nothing, so the mean is at least that of the gap.
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
    """Only the tokens of the longest windows: one cut off at the end is not like the others.

    Raises CorpusError where those hold fewer than 2 tokens.
    """
    if trace.sequence is None:
        raise ConfigError("trace: expected one that knows its sequences, got one that does not")
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
    """(n, steps): the mean loss over each sequence's tokens, at each step of the path."""
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
    """The path of a measure when nothing is known of its scores: all exits share a threshold.

    ``gain``: prices from 0.001 to 3 nats, in equal ratios. ``patience``: from all exits agreeing
    to 2. ``saturation``: 1 - s from 1e-4 to 1; the others: 1 - s from 0.001 to 0.9, in equal
    ratios.
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
    """The path as tuples; ConfigError unless no threshold rises on the way."""
    if not path:
        raise ConfigError("path: expected at least one step, got none")
    checked = tuple(ThresholdPolicy.of(list(step), num_exits).thresholds for step in path)
    for before, after in pairwise(checked):
        if any(new > old for old, new in zip(before, after, strict=True)):
            raise ConfigError(
                f"path: expected thresholds from conservative to bold, got {before}, then {after}"
            )
    return checked
