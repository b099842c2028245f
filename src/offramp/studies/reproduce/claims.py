"""Tests over seeds of the seed document's six findings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.studies.reproduce.methods import (
    ALL_LAYERS,
    ALPHA_03,
    ALPHA_05,
    ALPHA_07,
    METHODS,
    STANDARD_3,
    Study,
)
from offramp.studies.reproduce.published import (
    EXPERIMENT_5,
    EXPERIMENT_6_ALL_LAYERS,
    FITTING_THRESHOLD,
    STANDARD_3_LAYERS,
    THRESHOLD,
)
from offramp.studies.reproduce.wording import percent, ppl
from offramp.studies.statistics import (
    Comparison,
    Seeds,
    compare_below,
    compare_best,
    effect_size,
    holm,
    interval_pct,
    stat,
    verdict,
)

_HEADLINE = EXPERIMENT_5[0.7][0]
PUBLISHED_PCT: Mapping[int, float | None] = {
    1: 100.0 * (_HEADLINE / EXPERIMENT_5[0.5][0] - 1.0),
    2: 100.0 * (_HEADLINE / STANDARD_3_LAYERS[0] - 1.0),
    3: 100.0 * (_HEADLINE / EXPERIMENT_5[0.5][0] - 1.0),
    4: 100.0 * (_HEADLINE / EXPERIMENT_5[0.5][0] - 1.0),
    5: 100.0 * (EXPERIMENT_6_ALL_LAYERS[0] / _HEADLINE - 1.0),
    6: None,
}
"""The effect that the document gives for each finding: the difference of the PPL in percent.

Findings 1 and 4 have the lead over the strongest rival, which is α = 0.5 in the document. Finding 6
has no figure.
"""


@dataclass(frozen=True, kw_only=True)
class _Claim:
    claim: str
    published: str
    measured: str
    effect: Seeds
    "Log of the ratio that the claim is about, one per seed."
    comparison: Comparison
    test: str


def findings(study: Study) -> list[dict[str, Any]]:
    """Each of the document's six key findings: published, measured, direction and size.

    ``verdict`` is about the direction of the effect. ``size`` compares the published effect with
    ``ci_pct``, the 95% interval of the measured one; both are None where there is nothing to
    compare.
    """
    claims = [
        _best_of_all(study),
        _better_than_standard(study),
        _better_than_half(study),
        _best_alpha(study),
        _middle_loss_hurts(study),
        _middle_layer_as_features(study),
    ]
    corrected = holm([claim.comparison.p_value for claim in claims])
    return [
        {
            "id": number,
            "claim": claim.claim,
            "published": claim.published,
            "measured": claim.measured,
            "effect_pct": stat(100.0 * np.expm1(claim.effect)),
            "p_value": p_value,
            "p_value_uncorrected": claim.comparison.p_value,
            "n_seeds": len(study.seeds),
            "verdict": verdict(claim.comparison, p_value),
            **_size(claim.effect, PUBLISHED_PCT[number]),
            "test": f"{claim.test}; two-sided paired t test on log PPL over seeds, "
            "Holm-corrected over the six findings",
        }
        for number, (claim, p_value) in enumerate(zip(claims, corrected, strict=True), start=1)
    ]


def _size(effect: Seeds, published: float | None) -> dict[str, Any]:
    """The interval of an effect, and how it compares with the published effect."""
    interval = interval_pct(effect)
    return {
        "published_pct": published,
        "ci_pct": None if interval is None else list(interval),
        "size": None if published is None else effect_size(interval, published),
    }


def _best_of_all(study: Study) -> _Claim:
    best = study.log_ppl(ALPHA_07)
    rivals = {method.label: study.log_ppl(method) for method in METHODS.values()}
    del rivals[ALPHA_07.label]
    strongest = min(rivals, key=lambda label: float(rivals[label].mean()))
    return _Claim(
        claim="Asymmetric auxiliary loss (α = 0.7, no middle loss) is the best of all methods",
        published="PPL 22.95, the lowest",
        measured=f"PPL {ppl(best)}; strongest rival: {strongest}, {ppl(rivals[strongest])}",
        effect=best - rivals[strongest],
        comparison=compare_best(best, list(rivals.values())),
        test=f"against each of the {len(rivals)} other methods (ahead of all: the largest p; "
        "else the smallest p of those ahead of it, times their number)",
    )


def _better_than_standard(study: Study) -> _Claim:
    routed, standard = study.log_ppl(ALPHA_07), study.log_ppl(STANDARD_3)
    saved = np.array([100.0 - row.compute_pct for row in study.rows(ALPHA_07)])
    return _Claim(
        claim="34.2% better than the standard 3-layer model, with 35.0% less compute",
        published="PPL -34.2% (22.95 against 34.86), Compute% -35.0",
        measured=f"PPL {percent(routed - standard)} ({ppl(routed)} against {ppl(standard)}), "
        f"Compute% {-saved.mean():+.1f}",
        effect=routed - standard,
        comparison=compare_below(routed, standard),
        test=f"α = 0.7 routed at {study.threshold} against the standard 3-layer model",
    )


def _better_than_half(study: Study) -> _Claim:
    own, half = study.log_ppl(ALPHA_07), study.log_ppl(ALPHA_05)
    return _Claim(
        claim="4.3% better than the standard auxiliary loss (α = 0.5)",
        published="PPL -4.3% (22.95 against 23.98)",
        measured=f"PPL {percent(own - half)} ({ppl(own)} against {ppl(half)})",
        effect=own - half,
        comparison=compare_below(own, half),
        test=f"α = 0.7 against α = 0.5, both routed at {study.threshold}",
    )


def _best_alpha(study: Study) -> _Claim:
    own = study.log_ppl(ALPHA_07)
    others = {method.label: study.log_ppl(method) for method in (ALPHA_03, ALPHA_05)}
    strongest = min(others, key=lambda label: float(others[label].mean()))
    listed = ", ".join(f"{label}: {ppl(values)}" for label, values in others.items())
    return _Claim(
        claim="Weight on the shallow exit (α = 0.7) is the most effective",
        published="PPL 24.88, 23.98, 22.95 for α = 0.3, 0.5, 0.7",
        measured=f"{listed}, {ALPHA_07.label}: {ppl(own)}",
        effect=own - others[strongest],
        comparison=compare_best(own, list(others.values())),
        test="α = 0.7 against α = 0.3 and α = 0.5, all routed at "
        f"{study.threshold} (ahead of both: the larger p; else the smaller p of those ahead of "
        "it, times two)",
    )


def _middle_loss_hurts(study: Study) -> _Claim:
    own, every = study.log_ppl(ALPHA_07), study.log_ppl(ALL_LAYERS)
    measured = f"at equal threshold {study.threshold}: PPL {percent(every - own)} ({ppl(every)} "
    measured += f"against {ppl(own)})"
    if study.threshold == THRESHOLD:
        literal = study.log_ppl(ALL_LAYERS, FITTING_THRESHOLD)
        measured += f"; literally, {FITTING_THRESHOLD} against {THRESHOLD}: "
        measured += f"{percent(literal - own)} ({ppl(literal)})"
    return _Claim(
        claim="Adding the middle layer's loss makes it 39.8% worse",
        published="PPL +39.8% (32.07 against 22.95)",
        measured=measured,
        effect=every - own,
        comparison=compare_below(own, every),
        test=f"all layers against α = 0.7, both routed at {study.threshold}",
    )


def _middle_layer_as_features(study: Study) -> _Claim:
    own, every = study.log_exit_ppl(ALPHA_07, 3), study.log_exit_ppl(ALL_LAYERS, 3)
    return _Claim(
        claim="Layer 2 should be a pure intermediate layer: a loss there spoils the deep path",
        published="an explanation, no figure",
        measured=f"PPL of all tokens at layer 3: {ppl(every)} with the middle loss, "
        f"{ppl(own)} without ({percent(every - own)})",
        effect=every - own,
        comparison=compare_below(own, every),
        test="PPL at layer 3 of all layers against that of α = 0.7",
    )
