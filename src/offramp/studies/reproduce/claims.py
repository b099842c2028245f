"""Tests over seeds of the seed document's six findings and of its explanations."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.trace import ExitTrace
from offramp.studies.reproduce.methods import (
    ALL_LAYERS,
    ALPHA_03,
    ALPHA_05,
    ALPHA_07,
    METHODS,
    STANDARD_3,
    Study,
)
from offramp.studies.reproduce.published import FITTING_THRESHOLD, THRESHOLD
from offramp.studies.statistics import (
    Comparison,
    Seeds,
    compare_below,
    compare_best,
    holm,
    stat,
    verdict,
)


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
    """Each of the document's six key findings: published, measured, p, verdict."""
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
            "test": f"{claim.test}; two-sided paired t test on log PPL over seeds, "
            "Holm-corrected over the six findings",
        }
        for number, (claim, p_value) in enumerate(zip(claims, corrected, strict=True), start=1)
    ]


def _best_of_all(study: Study) -> _Claim:
    best = study.log_ppl(ALPHA_07)
    rivals = {method.label: study.log_ppl(method) for method in METHODS.values()}
    del rivals[ALPHA_07.label]
    strongest = min(rivals, key=lambda label: float(rivals[label].mean()))
    return _Claim(
        claim="Asymmetric auxiliary loss (α = 0.7, no middle loss) is the best of all methods",
        published="PPL 22.95, the lowest",
        measured=f"PPL {_ppl(best)}; strongest rival: {strongest}, {_ppl(rivals[strongest])}",
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
        measured=f"PPL {_percent(routed - standard)} ({_ppl(routed)} against {_ppl(standard)}), "
        f"Compute% {-saved.mean():+.1f}",
        effect=routed - standard,
        comparison=compare_below(routed, standard),
        test="α = 0.7 routed at 0.95 against the standard 3-layer model",
    )


def _better_than_half(study: Study) -> _Claim:
    own, half = study.log_ppl(ALPHA_07), study.log_ppl(ALPHA_05)
    return _Claim(
        claim="4.3% better than the standard auxiliary loss (α = 0.5)",
        published="PPL -4.3% (22.95 against 23.98)",
        measured=f"PPL {_percent(own - half)} ({_ppl(own)} against {_ppl(half)})",
        effect=own - half,
        comparison=compare_below(own, half),
        test="α = 0.7 against α = 0.5, both routed at 0.95",
    )


def _best_alpha(study: Study) -> _Claim:
    own = study.log_ppl(ALPHA_07)
    others = {method.label: study.log_ppl(method) for method in (ALPHA_03, ALPHA_05)}
    strongest = min(others, key=lambda label: float(others[label].mean()))
    listed = ", ".join(f"{label}: {_ppl(values)}" for label, values in others.items())
    return _Claim(
        claim="Weight on the shallow exit (α = 0.7) is the most effective",
        published="PPL 24.88, 23.98, 22.95 for α = 0.3, 0.5, 0.7",
        measured=f"{listed}, {ALPHA_07.label}: {_ppl(own)}",
        effect=own - others[strongest],
        comparison=compare_best(own, list(others.values())),
        test="α = 0.7 against α = 0.3 and α = 0.5, all routed at 0.95 (ahead of both: the larger "
        "p; else the smaller p of those ahead of it, times two)",
    )


def _middle_loss_hurts(study: Study) -> _Claim:
    own, every = study.log_ppl(ALPHA_07), study.log_ppl(ALL_LAYERS)
    literal = study.log_ppl(ALL_LAYERS, FITTING_THRESHOLD)
    return _Claim(
        claim="Adding the middle layer's loss makes it 39.8% worse",
        published="PPL +39.8% (32.07 against 22.95)",
        measured=f"at equal threshold {THRESHOLD}: PPL {_percent(every - own)} ({_ppl(every)} "
        f"against {_ppl(own)}); literally, {FITTING_THRESHOLD} against {THRESHOLD}: "
        f"{_percent(literal - own)} ({_ppl(literal)})",
        effect=every - own,
        comparison=compare_below(own, every),
        test="all layers against α = 0.7, both routed at 0.95",
    )


def _middle_layer_as_features(study: Study) -> _Claim:
    own, every = study.log_exit_ppl(ALPHA_07, 3), study.log_exit_ppl(ALL_LAYERS, 3)
    return _Claim(
        claim="Layer 2 should be a pure intermediate layer: a loss there spoils the deep path",
        published="an explanation, no figure",
        measured=f"PPL of all tokens at layer 3: {_ppl(every)} with the middle loss, "
        f"{_ppl(own)} without ({_percent(every - own)})",
        effect=every - own,
        comparison=compare_below(own, every),
        test="PPL at layer 3 of all layers against that of α = 0.7",
    )


def explanations(study: Study) -> list[dict[str, Any]]:
    """The document's explanations as questions, each with a figure and a test."""
    questions = [
        _more_confident(study),
        _easier(study),
        _many(study),
        _better_on_those_that_leave(study),
    ]
    corrected = holm([comparison.p_value for _, _, comparison in questions])
    answers = {"holds": "yes", "does not hold": "no", "undecided": "undecided"}
    return [
        {
            "question": question,
            "measured": measured,
            "p_value": p_value,
            "answer": answers[verdict(comparison, p_value)],
        }
        for (question, measured, comparison), p_value in zip(questions, corrected, strict=True)
    ]


_Question = tuple[str, str, Comparison]


def _more_confident(study: Study) -> _Question:
    own, every = (
        np.array([_mean_confidence(trace) for trace in study.traces(method)])
        for method in (ALPHA_07, ALL_LAYERS)
    )
    own_left, every_left = (
        np.array([row.shallow_pct for row in study.rows(method)])
        for method in (ALPHA_07, ALL_LAYERS)
    )
    return (
        "Does the middle loss make the first exit more confident?",
        f"mean max_prob at layer 1: {every.mean():.3f} with it, {own.mean():.3f} without; "
        f"Shallow% at {THRESHOLD}: {every_left.mean():.1f} with it, {own_left.mean():.1f} without",
        compare_below(own, every),
    )


def _easier(study: Study) -> _Question:
    groups = [_by_exit(trace) for trace in study.traces(ALPHA_07)]
    left, stayed = (
        {name: np.array([group[index][name] for group in groups]) for name in groups[0][0]}
        for index in (0, 1)
    )
    return (
        "Are the tokens that leave early (α = 0.7) really the easy ones?",
        f"those that left: PPL {_ppl(left['own'])} and accuracy {_share(left['accuracy'])} at "
        f"layer 1, and at layer 3 they would have had PPL {_ppl(left['deep'])}; those that "
        f"stayed: PPL {_ppl(stayed['own'])} and accuracy {_share(stayed['accuracy'])} at "
        "layer 3 (tested: PPL at layer 3 of the two groups)",
        compare_below(left["deep"], stayed["deep"]),
    )


def _many(study: Study) -> _Question:
    shallow = np.array([row.shallow_pct for row in study.rows(ALPHA_07)])
    return (
        f"Do most tokens leave at layer 1 (α = 0.7, threshold {THRESHOLD})?",
        f"Shallow% {shallow.mean():.1f} (from {shallow.min():.1f} to {shallow.max():.1f}; "
        "tested against 50)",
        compare_below(np.full(len(shallow), 50.0), shallow),
    )


def _better_on_those_that_leave(study: Study) -> _Question:
    own, half = [], []
    for mine, other in zip(study.traces(ALPHA_07), study.traces(ALPHA_05), strict=True):
        both = _left(mine) & _left(other)
        own.append(_mean(mine.nll[0], both))
        half.append(_mean(other.nll[0], both))
    whole = [study.log_exit_ppl(method, 1) for method in (ALPHA_07, ALPHA_05)]
    return (
        "Does α = 0.7 do better than α = 0.5 on the tokens that leave early?",
        f"PPL at layer 1 of the tokens that leave under both: {_ppl(np.array(own))} against "
        f"{_ppl(np.array(half))}; of all tokens: {_ppl(whole[0])} against {_ppl(whole[1])}",
        compare_below(np.array(own), np.array(half)),
    )


def _mean_confidence(trace: ExitTrace) -> float:
    return float(trace.confidence["max_prob"][0].mean(dtype=np.float64))


def _left(trace: ExitTrace) -> NDArray[np.bool_]:
    left: NDArray[np.bool_] = trace.confidence["max_prob"][0] >= np.float32(THRESHOLD)
    return left


def _mean(values: NDArray[Any], chosen: NDArray[np.bool_]) -> float:
    return float(values[chosen].mean(dtype=np.float64)) if chosen.any() else float("nan")


def _by_exit(trace: ExitTrace) -> tuple[dict[str, float], dict[str, float]]:
    """Mean NLL and accuracy of the tokens that left at layer 1, and of those that stayed."""
    right = trace.argmax == trace.targets
    left = _left(trace)

    def group(chosen: NDArray[np.bool_], row: int) -> dict[str, float]:
        return {
            "own": _mean(trace.nll[row], chosen),
            "deep": _mean(trace.nll[-1], chosen),
            "accuracy": _mean(right[row], chosen),
        }

    return group(left, 0), group(~left, -1)


def _ppl(log_ppl: Seeds) -> str:
    """Mean PPL over the seeds where there was something to measure."""
    measured = np.exp(log_ppl[np.isfinite(log_ppl)])
    return f"{measured.mean():.2f}" if len(measured) else "none"


def _share(shares: Seeds) -> str:
    """Mean share, in percent, over the seeds where there was something to measure."""
    measured = shares[np.isfinite(shares)]
    return f"{measured.mean():.1%}" if len(measured) else "none"


def _percent(log_ratio: Seeds) -> str:
    return f"{100.0 * np.expm1(log_ratio).mean():+.1f}%"
