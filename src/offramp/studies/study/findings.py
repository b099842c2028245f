"""The seed document's six findings, put to a test at equal FLOPs on a study's text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offramp.report.text import p_phrase
from offramp.studies.statistics import (
    Comparison,
    Seeds,
    compare_below,
    compare_best,
    holm,
    verdict,
)

ASYMMETRIC, HALF, LESS = "alpha 0.7", "alpha 0.5", "alpha 0.3"
MIDDLE = "alpha 0.7, middle 1"
SPOILS = "that loss spoils the last layer"
"""The one claim that is not about routing."""
CONFIDENCE = "max_prob"
"""The document's measure."""

Row = Mapping[str, Any]


def seed_findings(rows: Sequence[Row], compared_at: float) -> list[str]:
    """A sentence on each, from rows by max_prob under recompute, compared with ``ASYMMETRIC``."""
    by_label = {str(row["label"]): row for row in rows}
    own = by_label[ASYMMETRIC]
    point = f"{compared_at:g}"
    routed = {
        label: -_log(row["to_baseline"])  # of ours to theirs
        for label, row in by_label.items()
        if label != ASYMMETRIC
    }
    rivals = {**routed, "static models": _log(own["ratio_to_static_at"][point])}
    strongest = max(rivals, key=lambda label: float(rivals[label].mean()))
    standard = _log(own["ratio_to_standard_at"][point])
    middle = by_label[MIDDLE]
    final = _log(middle["final_to_baseline"])
    zero = np.zeros(len(standard))
    routing = f" at {point}% of FLOPs by {CONFIDENCE}"
    tested: list[tuple[str, str, Comparison]] = [
        (
            f"{ASYMMETRIC} is the best of all methods",
            f"{_percent(rivals[strongest])} against the strongest rival, {strongest}",
            compare_best(zero, [-difference for difference in rivals.values()]),
        ),
        (
            "it beats the standard model with a third less compute",
            f"{_percent(standard)} against the standard model at 100%",
            compare_below(standard, zero),
        ),
        (
            f"it beats {HALF}, the usual auxiliary loss",
            _percent(routed[HALF]),
            compare_below(routed[HALF], zero),
        ),
        (
            f"weight on the shallow exit is best: it beats {LESS} and {HALF}",
            f"{_percent(routed[LESS])} against {LESS}, {_percent(routed[HALF])} against {HALF}",
            compare_best(zero, [-routed[LESS], -routed[HALF]]),
        ),
        (
            "the loss of the layers in between makes it worse",
            f"with it {_percent(-routed[MIDDLE])}",
            compare_below(routed[MIDDLE], zero),
        ),
        (
            SPOILS,
            f"the last layer: {_percent(final)} with it",
            compare_below(-final, zero),
        ),
    ]
    corrected = holm([comparison.p_value for _, _, comparison in tested])
    return [
        f"Finding {number} of the seed document, {claim}: {verdict(comparison, p)} here"
        f"{'' if claim == SPOILS else routing} ({measured}; {p_phrase(p)}, Holm's correction over "
        "the six)."
        for number, ((claim, measured, comparison), p) in enumerate(
            zip(tested, corrected, strict=True), start=1
        )
    ]


def _log(ratio: Mapping[str, Any]) -> Seeds:
    values = [np.nan if value is None else float(value) for value in ratio["values"]]
    return np.log(np.asarray(values, dtype=np.float64))


def _percent(log_ratio: Seeds) -> str:
    """Of the PPL, the geometric mean over the seeds."""
    return f"PPL {100.0 * np.expm1(log_ratio.mean()):+.1f}%"
