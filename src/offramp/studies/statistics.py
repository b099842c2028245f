"""Means and standard deviations over seeds, paired tests, and verdicts on claims."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Verdict = Literal["holds", "does not hold", "undecided"]
Seeds = NDArray[np.float64]
SIGNIFICANT = 0.05


def stat(values: Sequence[float] | Seeds) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value) and every value."""
    array = np.asarray(values, dtype=np.float64)
    return {
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else None,
        "values": [float(value) for value in array],
    }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outcome of a test of a claim."""

    claimed_direction: bool
    "Whether the mean difference has the direction that the claim says."
    p_value: float | None
    "Two-sided p value; None with one seed."


def paired_test(differences: Seeds) -> float | None:
    """p value of a two-sided paired t test on one difference per seed; None with one seed."""
    if len(differences) < 2:
        return None
    if np.ptp(differences) == 0.0:  # no spread, no test
        return 1.0 if differences[0] == 0.0 else None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def compare_below(candidate: Seeds, rival: Seeds) -> Comparison:
    """Test the claim that ``candidate`` is below ``rival``, seed by seed.

    Seeds where one of the two is NaN, because nothing could be measured, are left out.
    """
    differences = candidate - rival
    differences = differences[np.isfinite(differences)]
    return Comparison(
        claimed_direction=bool(differences.sum() < 0.0), p_value=paired_test(differences)
    )


def compare_best(candidate: Seeds, rivals: Sequence[Seeds]) -> Comparison:
    """Test the claim that ``candidate`` is below every rival.

    If it is, on average, then it must beat each of them, so the largest p counts
    (intersection-union test). If some rivals are below it, the smallest p of theirs counts,
    times the number of rivals (Bonferroni).
    """
    comparisons = [compare_below(candidate, rival) for rival in rivals]
    ahead = [comparison for comparison in comparisons if not comparison.claimed_direction]
    p_values = [comparison.p_value for comparison in ahead or comparisons]
    known = [p for p in p_values if p is not None]
    if not known:
        return Comparison(claimed_direction=not ahead, p_value=None)
    p_value = min(1.0, min(known) * len(rivals)) if ahead else max(known)
    return Comparison(claimed_direction=not ahead, p_value=p_value)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values after Holm's step-down correction (Holm 1979); None stays None."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[index] = largest
    return corrected


def verdict(comparison: Comparison, corrected_p: float | None) -> Verdict:
    """ "holds" or "does not hold" where p < .05 in or against the claimed direction."""
    if corrected_p is None or not corrected_p < SIGNIFICANT:
        return "undecided"
    return "holds" if comparison.claimed_direction else "does not hold"


def distance_in_std(published: float, measured: Sequence[float] | Seeds) -> float | None:
    """Distance of a figure from the measured mean, in measured standard deviations."""
    summary = stat(measured)
    if not summary["std"]:
        return None
    distance = (published - summary["mean"]) / summary["std"]
    return distance if math.isfinite(distance) else None
