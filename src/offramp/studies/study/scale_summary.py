"""Makes the result of the study ``scale`` from its runs: ratios, a line, and answers in words.

Nothing here trains or runs a model.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from offramp.report.scale_result import Fit, OnLine, ScaleResult, Size, millions
from offramp.report.study_result import Number, Row, Spread, StudyResult
from offramp.report.text import p_phrase
from offramp.studies.line import Line, fit_line
from offramp.studies.statistics import FEWEST_SEEDS, SIGNIFICANT, Interval, stat
from offramp.studies.study.plan import Study
from offramp.studies.study.sizes import Sized
from offramp.studies.study.summary import summarise
from offramp.version import __version__

EXTRAPOLATED = 100e6
"""Number of parameters for which the fitted line is asked."""
_MOST = 50.0
"""Largest log ratio that is written as a ratio."""


def summarise_scale(
    study: Study, sizes: Sequence[Sized], folder: Path, *, missing: Sequence[int]
) -> ScaleResult:
    """Summarise the sizes, whose runs are complete; ``missing`` are the widths of the others."""
    results = [summarise(size.study, size.runs, folder) for size in sizes]
    found = [_size(size, result) for size, result in zip(sizes, results, strict=True)]
    confidence, missing_kv = results[0].families[0]
    whole = ScaleResult(
        study=study.name,
        question=study.question,
        text=results[0].text,
        offramp_version=__version__,
        test_tokens=results[0].test_tokens,
        seeds=results[0].seeds,
        compared_at=study.compared_at,
        confidence=confidence,
        missing_kv=missing_kv,
        sizes=tuple(found),
        missing=tuple(missing),
        fit=_fit(found),
    )
    return replace(whole, answers=tuple(_answers(whole)))


def _size(size: Sized, result: StudyResult) -> Size:
    """The figures of one size, of its only recipe by the first measure."""
    row, at = _row(result), result.compared_at
    ppl, to_static = row.ppl_at[at], row.ratio_to_static_at[at]
    standard = result.static_kinds[size.study.model.num_hidden_layers, None]
    static = [
        None if mine is None or ratio is None else mine / ratio
        for mine, ratio in zip(ppl.values, to_static.values, strict=True)
    ]
    return Size(
        width=size.width,
        layers=size.study.model.num_hidden_layers,
        parameters=size.parameters,
        train_tokens=result.train_tokens,
        tokens_per_parameter=result.train_tokens / size.parameters,
        epochs=result.train_tokens / size.text_tokens,
        ppl=Spread(mean=ppl.mean, std=ppl.std, values=ppl.values),
        static_ppl=_spread(static),
        standard_ppl=_spread([model.ppl for model in standard]),
        to_static=to_static,
        to_standard=row.ratio_to_standard_at[at],
        runs=tuple(run.name for run in size.runs),
    )


def _row(result: StudyResult) -> Row:
    (row,) = result.family(*result.families[0])
    return row


def _spread(values: Sequence[Number]) -> Spread:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Spread(mean=None, std=None, values=tuple(values))
    found = stat(known)
    return Spread(mean=found["mean"], std=found["std"], values=tuple(known))


def _fit(sizes: Sequence[Size]) -> Fit | None:
    """Fit the log ratio to the logs of the parameters, to base ten; None with one size."""
    points = [
        (size.parameters, ratio)
        for size in sizes
        for ratio in size.to_static.values
        if ratio is not None
    ]
    parameters, ratios = np.asarray(points, dtype=np.float64).reshape(-1, 2).T
    line = fit_line(np.log10(parameters), np.log(ratios))
    if line is None:
        return None
    least, most = float(parameters.min()), float(parameters.max())
    far = max(EXTRAPOLATED, 10 * most)
    places = {*parameters.tolist(), *np.geomspace(least, most, 9), *np.geomspace(most, far, 9)}
    curve = tuple(_on_line(line, float(at)) for at in sorted(places))
    return Fit(
        models=line.count,
        change=_ratio(line.slope),
        interval=_ratios(line.slope_interval),
        p_value=line.p_value,
        curve=curve,
        extrapolated=curve[-1],
    )


def _on_line(line: Line, parameters: float) -> OnLine:
    x = float(np.log10(parameters))
    return OnLine(
        parameters=parameters,
        ratio=_ratio(line.at(x)),
        interval=_ratios(line.interval(x)),
        prediction=_ratios(line.interval(x, of_a_point=True)),
    )


def _ratio(log: float) -> float:
    return float(np.exp(np.clip(log, -_MOST, _MOST)))


def _ratios(logs: Interval | None) -> Interval | None:
    return None if logs is None else (_ratio(logs[0]), _ratio(logs[1]))


def _answers(result: ScaleResult) -> list[str]:
    """What was found, in words: by size, on growth, extrapolated, and what is missing."""
    said = [_by_size(result)]
    if result.fit is not None:
        said += [_growth(result, result.fit), _far(result, result.fit)]
    else:
        said.append("Whether the advantage grows with size takes two sizes at least.")
    if result.missing:
        widths = ", ".join(map(str, result.missing))
        said.append(
            f"The study is not complete: the runs of width {widths} are missing. The same command "
            "continues it."
        )
    return said


def _by_size(result: ScaleResult) -> str:
    parts = [
        f"{_percent(size.to_static.mean)} with {millions(size.parameters)} parameters and "
        f"{size.epochs:.1f} epochs ({p_phrase(size.to_static.p_value)})"
        for size in result.sizes
    ]
    return (
        f"At {result.compared_at:g}% of FLOPs the early-exit model's PPL differs from that of "
        f"static models of equal FLOPs by {'; '.join(parts)}."
    )


def _growth(result: ScaleResult, fit: Fit) -> str:
    decided = fit.p_value is not None and fit.p_value < SIGNIFICANT
    if not decided or len(result.seeds) < FEWEST_SEEDS:
        verdict = "undecided"
    else:
        verdict = "it grows" if fit.change < 1 else "it shrinks"
    return (
        f"Does the advantage over static models grow or shrink with size? Here {verdict}: with "
        f"ten times the parameters, the ratio of the two PPLs changes by {_percent(fit.change)} "
        f"(95% interval {_interval(fit.interval)}, {p_phrase(fit.p_value)}), by a line through "
        f"the log ratios of {fit.models} pairs of {len(result.sizes)} sizes. Larger models also "
        "train for more steps and read the text more often, which this study cannot tell from "
        "their size."
    )


def _far(result: ScaleResult, fit: Fit) -> str:
    at, counts = fit.extrapolated, [size.parameters for size in result.sizes]
    beyond, span = at.parameters / max(counts), max(counts) / min(counts)
    return (
        f"Extrapolated, not measured: at {millions(at.parameters)} parameters the line predicts a "
        f"difference of {_percent(at.ratio)} (95% interval for one more seed "
        f"{_interval(at.prediction)}). That is {beyond:.0f} times the largest size; sizes within "
        f"a factor of {span:.1f} do not carry that far, and the interval counts the spread of the "
        "seeds, not that the line may bend."
    )


def _interval(ratios: Interval | None) -> str:
    return "not known" if ratios is None else " to ".join(map(_percent, ratios))


def _percent(ratio: Number) -> str:
    return "an unknown amount" if ratio is None else f"{100 * (ratio - 1):+.1f}%"
