"""The seed document's explanations as questions, each with a figure and a test over seeds."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.trace import ExitTrace
from offramp.studies.reproduce.methods import ALL_LAYERS, ALPHA_05, ALPHA_07, Study
from offramp.studies.reproduce.wording import ppl, share
from offramp.studies.statistics import Comparison, compare_below, holm, verdict


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
        f"Shallow% at {study.threshold}: {every_left.mean():.1f} with it, "
        f"{own_left.mean():.1f} without",
        compare_below(own, every),
    )


def _easier(study: Study) -> _Question:
    groups = [_by_exit(trace, study.threshold) for trace in study.traces(ALPHA_07)]
    left, stayed = (
        {name: np.array([group[index][name] for group in groups]) for name in groups[0][0]}
        for index in (0, 1)
    )
    return (
        "Are the tokens that leave early (α = 0.7) really the easy ones?",
        f"those that left: PPL {ppl(left['own'])} and accuracy {share(left['accuracy'])} at "
        f"layer 1, and at layer 3 they would have had PPL {ppl(left['deep'])}; those that "
        f"stayed: PPL {ppl(stayed['own'])} and accuracy {share(stayed['accuracy'])} at "
        "layer 3 (tested: PPL at layer 3 of the two groups)",
        compare_below(left["deep"], stayed["deep"]),
    )


def _many(study: Study) -> _Question:
    shallow = np.array([row.shallow_pct for row in study.rows(ALPHA_07)])
    return (
        f"Do most tokens leave at layer 1 (α = 0.7, threshold {study.threshold})?",
        f"Shallow% {shallow.mean():.1f} (from {shallow.min():.1f} to {shallow.max():.1f}; "
        "tested against 50)",
        compare_below(np.full(len(shallow), 50.0), shallow),
    )


def _better_on_those_that_leave(study: Study) -> _Question:
    own, half = [], []
    for mine, other in zip(study.traces(ALPHA_07), study.traces(ALPHA_05), strict=True):
        both = _left(mine, study.threshold) & _left(other, study.threshold)
        own.append(_mean(mine.nll[0], both))
        half.append(_mean(other.nll[0], both))
    whole = [study.log_exit_ppl(method, 1) for method in (ALPHA_07, ALPHA_05)]
    return (
        "Does α = 0.7 do better than α = 0.5 on the tokens that leave early?",
        f"PPL at layer 1 of the tokens that leave under both: {ppl(np.array(own))} against "
        f"{ppl(np.array(half))}; of all tokens: {ppl(whole[0])} against {ppl(whole[1])}",
        compare_below(np.array(own), np.array(half)),
    )


def _mean_confidence(trace: ExitTrace) -> float:
    return float(trace.confidence["max_prob"][0].mean(dtype=np.float64))


def _left(trace: ExitTrace, threshold: float) -> NDArray[np.bool_]:
    left: NDArray[np.bool_] = trace.confidence["max_prob"][0] >= np.float32(threshold)
    return left


def _mean(values: NDArray[Any], chosen: NDArray[np.bool_]) -> float:
    return float(values[chosen].mean(dtype=np.float64)) if chosen.any() else float("nan")


def _by_exit(trace: ExitTrace, threshold: float) -> tuple[dict[str, float], dict[str, float]]:
    """Mean NLL and accuracy of the tokens that left at layer 1, and of those that stayed."""
    right = trace.argmax == trace.targets
    left = _left(trace, threshold)

    def group(chosen: NDArray[np.bool_], row: int) -> dict[str, float]:
        return {
            "own": _mean(trace.nll[row], chosen),
            "deep": _mean(trace.nll[-1], chosen),
            "accuracy": _mean(right[row], chosen),
        }

    return group(left, 0), group(~left, -1)
