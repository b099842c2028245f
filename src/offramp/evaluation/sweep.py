"""Threshold sweeps: PPL, Shallow% and Compute% of any number of thresholds from one trace."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from offramp.evaluation.cost import compute_pct
from offramp.evaluation.trace import ExitTrace, perplexity
from offramp.exits.policy import ThresholdPolicy

Threshold = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One policy on one text, under ``missing_kv="recompute"``."""

    threshold: Threshold
    ppl: float
    shallow_pct: float
    "Share of tokens that left before the last layer, in percent."
    compute_pct: float
    exit_share: dict[int, float]
    "Share of tokens, 0 to 1, by exit layer."


def sweep(
    trace: ExitTrace, thresholds: Iterable[float | Sequence[float]], *, confidence: str = "max_prob"
) -> list[SweepRow]:
    """One row for each threshold: a number for all exits, or one number for each but the last."""
    scores = trace.confidence[confidence][:-1]
    # a product with 0 and 1 is several times faster than choosing; it must not meet infinity
    nll = np.minimum(trace.nll.astype(np.float64), 1e300)
    rows = []
    for threshold in thresholds:
        here = ThresholdPolicy.of(threshold, len(trace.exit_layers)).leaving(scores)
        counts = [int(np.count_nonzero(leaving)) for leaving in here]
        total = sum(
            float(np.dot(leaving.astype(np.float64), losses))
            for leaving, losses in zip(here, nll, strict=True)
        )
        rows.append(
            SweepRow(
                threshold=tuple(threshold) if isinstance(threshold, Sequence) else threshold,
                ppl=perplexity(total / trace.num_tokens),
                shallow_pct=100.0 * sum(counts[:-1]) / trace.num_tokens,
                compute_pct=compute_pct(counts, trace.exit_layers, trace.num_layers),
                exit_share={
                    layer: count / trace.num_tokens
                    for layer, count in zip(trace.exit_layers, counts, strict=True)
                },
            )
        )
    return rows
