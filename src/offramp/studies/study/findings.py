"""The seed document's six findings, tested at equal FLOPs on a study's text.

The document is "Experiment 5 & 6: Asymmetric Auxiliary Loss Training" (in Japanese), which builds
on Elbayad et al. (2020), "Depth-Adaptive Transformer".
"""

from collections.abc import Sequence

import numpy as np

from offramp.report.study_result import Ratio, Row
from offramp.report.text import SEED_TITLE, p_phrase
from offramp.studies.statistics import (
    Comparison,
    Seeds,
    Verdict,
    compare_below,
    compare_best,
    holm,
    verdict,
)

ASYMMETRIC, HALF, LESS = "alpha 0.7", "alpha 0.5", "alpha 0.3"
MIDDLE = "alpha 0.7, middle 1"
SPOILS = "a loss at the layers in between harms the last layer"
"""The claim that is not about routing."""
CONFIDENCE = "max_prob"
"""The document's measure."""


def seed_findings(rows: Sequence[Row], compared_at: float) -> list[str]:
    """A sentence on each finding, from rows by max_prob under recompute.

    The rows must be compared with ``ASYMMETRIC`` as their baseline.
    """
    by_label = {row.label: row for row in rows}
    own, middle = by_label[ASYMMETRIC], by_label[MIDDLE]
    routed = {
        label: -_log(row.to_baseline)  # log PPL of ours minus theirs
        for label, row in by_label.items()
        if label != ASYMMETRIC
    }
    rivals = {**routed, "static models": _log(own.ratio_to_static_at[compared_at])}
    strongest = max(rivals, key=lambda label: float(rivals[label].mean()))
    standard = _log(own.ratio_to_standard_at[compared_at])
    final = _log(middle.final_to_baseline)
    zero = np.zeros(len(standard))
    tested: list[tuple[str, str, Comparison]] = [
        (
            f"{ASYMMETRIC} is the best of all methods",
            f"{_percent(rivals[strongest])} compared with the strongest rival, {strongest}",
            compare_best(zero, [-difference for difference in rivals.values()]),
        ),
        (
            f"{ASYMMETRIC} beats the standard model with a third less compute",
            f"{_percent(standard)} compared with the standard model at 100%",
            compare_below(standard, zero),
        ),
        (
            f"{ASYMMETRIC} beats {HALF}, the usual auxiliary loss",
            _percent(routed[HALF]),
            compare_below(routed[HALF], zero),
        ),
        (
            f"more weight on the shallow exit is better: {ASYMMETRIC} beats {LESS} and {HALF}",
            f"{_percent(routed[LESS])} compared with {LESS}, {_percent(routed[HALF])} compared "
            f"with {HALF}",
            compare_best(zero, [-routed[LESS], -routed[HALF]]),
        ),
        (
            "a loss at the layers in between makes the PPL worse",
            f"with that loss {_percent(-routed[MIDDLE])}",
            compare_below(routed[MIDDLE], zero),
        ),
        (
            SPOILS,
            f"last layer: {_percent(final)} with that loss",
            compare_below(-final, zero),
        ),
    ]
    corrected = holm([comparison.p_value for _, _, comparison in tested])
    return [
        _sentence(number, claim, measured, verdict(comparison, p), p, compared_at)
        for number, ((claim, measured, comparison), p) in enumerate(
            zip(tested, corrected, strict=True), start=1
        )
    ]


def _sentence(
    number: int, claim: str, measured: str, found: Verdict, p: float | None, compared_at: float
) -> str:
    title = f" ({SEED_TITLE})" if number == 1 else ""
    where = f" at {compared_at:g}% of FLOPs with confidence {CONFIDENCE}"
    return (
        f"Finding {number} of the seed document{title}, that {claim}: {found} here"
        f"{'' if claim == SPOILS else where} ({measured}; {p_phrase(p)} after Holm's correction "
        "over the six)."
    )


def _log(ratio: Ratio | None) -> Seeds:
    """Log of each seed's ratio."""
    assert ratio is not None  # the study has a baseline
    values = [np.nan if value is None else value for value in ratio.values]
    return np.log(np.asarray(values, dtype=np.float64))


def _percent(log_ratio: Seeds) -> str:
    """The change of the PPL, the geometric mean over the seeds."""
    return f"PPL {100.0 * np.expm1(log_ratio.mean()):+.1f}%"
