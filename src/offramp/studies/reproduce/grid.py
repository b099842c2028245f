"""The alphas and thresholds that a reader asked for, beside the document's."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from offramp.studies.reproduce.methods import METHODS, STANDARD_3, Method, Study, asymmetric
from offramp.studies.reproduce.tables import row
from offramp.studies.statistics import interval_pct, stat


def more_methods(alphas: Sequence[float]) -> tuple[Method, ...]:
    """Return a method for each alpha that is not one of the document's."""
    asked = (asymmetric(abs(float(alpha))) for alpha in alphas)  # no -0.0
    return tuple(method for method in asked if method.key not in METHODS)


def grid(study: Study, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """Return a table row for every method that routes at every threshold.

    Each row also has the difference of its PPL to that of the standard 3-layer model, in percent,
    and the 95% interval of it. There are no rows if nothing was asked for.
    """
    if not thresholds and not study.more:
        return []
    routed = sorted(
        (method for method in study.methods if method.routed),
        key=lambda method: (method.weights["2"], method.weights["1"]),
    )
    standard = study.log_ppl(STANDARD_3)
    rows = []
    for method in routed:
        for threshold in thresholds or (study.threshold,):
            effect = study.log_ppl(method, threshold) - standard
            interval = interval_pct(effect)
            rows.append(
                {
                    **row(study, method, threshold=threshold),
                    "effect_pct": stat(100.0 * np.expm1(effect)),
                    "ci_pct": None if interval is None else list(interval),
                }
            )
    return rows
