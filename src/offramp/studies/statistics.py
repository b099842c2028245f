"""Means and deviations over seeds, paired tests, intervals, power, and verdicts on claims."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Verdict = Literal["holds", "does not hold", "undecided"]
Size = Literal["as published", "smaller", "larger", "opposite", "undecided"]
Seeds = NDArray[np.float64]
SIGNIFICANT = 0.05
FEWEST_SEEDS = 3
"""With fewer seeds no claim gets a verdict, whatever its p value."""


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
    seeds: int
    "Number of seeds that the test used."


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
        claimed_direction=bool(differences.sum() < 0.0),
        p_value=paired_test(differences),
        seeds=len(differences),
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
    seeds = min(comparison.seeds for comparison in comparisons)
    if not known:
        return Comparison(claimed_direction=not ahead, p_value=None, seeds=seeds)
    p_value = min(1.0, min(known) * len(rivals)) if ahead else max(known)
    return Comparison(claimed_direction=not ahead, p_value=p_value, seeds=seeds)


Interval = tuple[float, float]


def interval_pct(log_ratios: Seeds) -> Interval | None:
    """Return the 95% t interval of the mean log ratio, as a difference in percent.

    Seeds where nothing could be measured (NaN) are left out. None with fewer than
    ``FEWEST_SEEDS`` seeds.
    """
    known = log_ratios[np.isfinite(log_ratios)]
    if len(known) < FEWEST_SEEDS:
        return None
    half = stats.t.ppf(1.0 - SIGNIFICANT / 2.0, len(known) - 1) * stats.sem(known)
    low, high = np.clip((known.mean() - half, known.mean() + half), -50.0, 50.0)
    return float(100.0 * np.expm1(low)), float(100.0 * np.expm1(high))


def effect_size(interval: Interval | None, published: float) -> Size:
    """Compare the interval of an effect with the published effect, both in percent.

    It is "undecided" if the interval contains both 0 and the published effect, or if there is no
    interval. Else it is "as published" if the published effect is inside, "opposite" if the whole
    interval has the other sign, and "smaller" or "larger" than the published effect.
    """
    if interval is None:
        return "undecided"
    low, high = interval if published >= 0.0 else (-interval[1], -interval[0])
    published = abs(published)
    if low <= published <= high:
        return "undecided" if low <= 0.0 else "as published"
    if high < 0.0:
        return "opposite"
    return "larger" if low > published else "smaller"


def power_of_test(*, seeds: int, effect: float, spread: float, significance: float) -> float:
    """Return the power of a two-sided paired t test on one difference per seed.

    That is the probability that the effect is found, with its true direction, by the noncentral
    t distribution. ``effect`` is the true mean of the differences and ``spread`` their standard
    deviation, in the same unit; ``significance`` is the level of the test. It is 0 with fewer
    than ``FEWEST_SEEDS`` seeds, which give no verdict.
    """
    if seeds < FEWEST_SEEDS:
        return 0.0
    limit = stats.t.ppf(1.0 - significance / 2.0, seeds - 1)
    return float(stats.nct.sf(limit, seeds - 1, abs(effect) / spread * math.sqrt(seeds)))


def seeds_for_power(power: float, *, effect: float, spread: float, significance: float) -> int:
    """Return the smallest number of seeds with which a paired t test has that power."""
    seeds = FEWEST_SEEDS
    while (
        power_of_test(seeds=seeds, effect=effect, spread=spread, significance=significance) < power
    ):
        seeds += 1
    return seeds


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
    """ "holds" or "does not hold" where p < .05 in or against the claimed direction.

    It is "undecided" with fewer than ``FEWEST_SEEDS`` seeds, whatever p is.
    """
    if corrected_p is None or not corrected_p < SIGNIFICANT or comparison.seeds < FEWEST_SEEDS:
        return "undecided"
    return "holds" if comparison.claimed_direction else "does not hold"


def distance_in_std(published: float, measured: Sequence[float] | Seeds) -> float | None:
    """Distance of a figure from the measured mean, in measured standard deviations."""
    summary = stat(measured)
    if not summary["std"]:
        return None
    distance = (published - summary["mean"]) / summary["std"]
    return distance if math.isfinite(distance) else None
