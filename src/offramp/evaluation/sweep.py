"""Threshold sweeps: PPL, Shallow%, Compute% and FLOPs% of many thresholds from one trace."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.cost import ModelCost, compute_pct
from offramp.evaluation.trace import ExitTrace, perplexity
from offramp.exits.policy import Decay, ThresholdPolicy

Threshold = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One policy on one text, under ``missing_kv="recompute"``; exact if its exits are complete."""

    threshold: Threshold
    "One number for all exits, or one number for each exit but the last."
    ppl: float
    shallow_pct: float
    "Share of tokens that left before the last layer, in percent."
    compute_pct: float
    exit_share: dict[int, float]
    "Share of tokens, 0 to 1, by exit layer."
    flops_pct: float | None = None
    "FLOPs of layers, heads and gates in percent of the full model; None if no cost was given."


def sweep(
    trace: ExitTrace,
    thresholds: Iterable[float | Sequence[float]],
    *,
    confidence: str = "max_prob",
    cost: ModelCost | None = None,
    decay: Decay | None = None,
) -> list[SweepRow]:
    """Return one row per threshold: a number for all exits, or one number for each but the last.

    An exit whose threshold is infinite is not evaluated and costs nothing. With ``decay`` the
    thresholds decrease with the position in the window.
    """
    scores = trace.scores(confidence)[:-1]
    nll = finite_nll(trace)
    rows = []
    for threshold in thresholds:
        policy = ThresholdPolicy.of(threshold, len(trace.exit_layers), decay=decay)
        evaluated = [math.isfinite(value) for value in policy.thresholds]
        rows.append(
            _row(
                trace,
                nll,
                policy.leaving(scores, trace.position),
                tuple(threshold) if isinstance(threshold, Sequence) else threshold,
                None if cost is None else cost.flops_pct_by_exit(confidence, evaluated=evaluated),
            )
        )
    return rows


def finite_nll(trace: ExitTrace) -> NDArray[np.float64]:
    """Return the losses (E, N) in float64; infinite ones become finite, so that 0 x loss is 0."""
    return np.minimum(trace.nll.astype(np.float64), 1e300)


def _row(
    trace: ExitTrace,
    nll: NDArray[np.float64],
    here: NDArray[np.bool_],
    threshold: Threshold,
    costs: Sequence[float] | None,
) -> SweepRow:
    """Compute one row from the mask of where tokens leave.

    A product with a mask is several times faster than indexing. It uses einsum, because BLAS
    would start threads, which takes longer than the sum on a busy machine.
    """
    counts = [int(np.count_nonzero(leaving)) for leaving in here]
    total = sum(
        float(np.einsum("n,n->", leaving.astype(np.float64), losses))
        for leaving, losses in zip(here, nll, strict=True)
    )
    tokens = trace.num_tokens
    return SweepRow(
        threshold=threshold,
        ppl=perplexity(total / tokens),
        shallow_pct=100.0 * sum(counts[:-1]) / tokens,
        compute_pct=compute_pct(counts, trace.exit_layers, trace.num_layers),
        exit_share={
            layer: count / tokens for layer, count in zip(trace.exit_layers, counts, strict=True)
        },
        flops_pct=None if costs is None else float(np.dot(costs, counts)) / tokens,
    )
