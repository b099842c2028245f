"""The plots of a study: pure functions from its result to an Altair chart."""

from collections.abc import Iterator, Sequence
from math import log
from typing import Any, Literal

import altair as alt
import numpy as np

from offramp.report.drawing import data_chart, layer
from offramp.report.labels import rows_for, text_width
from offramp.report.look import SCREEN, SHAPES, Look
from offramp.report.order import values_of
from offramp.report.study_curves import cost_curves
from offramp.report.study_result import Curve, StudyResult, StudyTimes
from offramp.report.study_tables import early_exits

WIDTH = 760
ROW = 24  # height of a row of a recipe
KINDS = ("exit", "routed", "last layer")
Cost = Literal["flops_pct", "compute_pct"]
COSTS: dict[Cost, tuple[str, str]] = {
    "flops_pct": ("FLOPs%", "of full depth, with heads and gates"),
    "compute_pct": ("Compute%", "of all layers"),
}
LARGEST_RATIO = 1.5  # to the best PPL; worse ones are left out of the picture of a frontier


def recipes(result: StudyResult, look: Look = SCREEN) -> alt.LayerChart:
    """PPL of each recipe's exits, routed, and of its last layer; the static models as lines."""
    records = list(_recipe_records(result))
    order = list(dict.fromkeys(record["recipe"] for record in records))
    static = _static_means(result)
    values = [record[key] for record in records for key in ("low", "high")]
    low, high = min([*values, *(ppl for _, ppl in static)]), max(values, default=1.0)
    domain = [low * (low / high) ** 0.03, high * (high / low) ** 0.03]
    width, height = look.size(WIDTH, ROW * max(1, len(order)))
    title = "PPL (per token; logarithmic axis)"
    y = alt.Y("recipe:N", sort=order, title=None).axis(labelLimit=width / 2)
    x = alt.X("ppl:Q", title=title).scale(type="log", nice=False, domain=domain)
    legend = alt.Legend(orient="bottom", labelLimit=0)  # the rows above may be many
    colour = alt.Color("kind:N", title=None, legend=legend)
    colour = colour.scale(domain=list(KINDS), range=list(look.palette[: len(KINDS)]))
    shape = alt.Shape("kind:N", title=None, legend=legend)
    shape = shape.scale(domain=list(KINDS), range=list(SHAPES[: len(KINDS)]))
    tooltip = [alt.Tooltip("recipe:N"), alt.Tooltip("kind:N"), alt.Tooltip("ppl:Q", format=".3f")]
    base = data_chart(records)
    marks = base.mark_point(filled=True, size=2.5 * look.point, opacity=1)
    marks = marks.encode(x=x, y=y, color=colour, shape=shape, tooltip=tooltip)
    bars = base.mark_rule(strokeWidth=look.line).encode(y=y, color=colour, x2="high:Q")
    low_x = alt.X("low:Q", title=title).scale(type="log", nice=False, domain=domain)
    beside = _static_lines(static, domain, width, look)
    return layer(*beside, bars.encode(x=low_x), marks).properties(
        width=width,
        height=height,
        title=look.title(result.question, width=width),
        description=(
            "The PPL if every token leaves at the exit, the routed PPL at "
            f"{result.compared_at:g}% of FLOPs, and the PPL of the last layer; means over the "
            "seeds ± 1 standard deviation. Dashed: static models with that number of layers."
        ),
    )


def _static_lines(
    static: Sequence[tuple[int, float]], domain: Sequence[float], width: float, look: Look
) -> list[alt.Chart]:
    """A dashed line for each static model, with its number of layers in rows above the plot."""
    span = log(domain[1] / domain[0])
    says = [str(layers) for layers, _ in static]
    says[0] += " (layers of a static model)"
    font = look.font_size
    widths = [text_width(text, font) for text in says]
    starts = [log(ppl / domain[0]) / span * width for _, ppl in static]
    rows = rows_for([at + 0.5 * wide for at, wide in zip(starts, widths, strict=True)], widths)
    drawn = [
        data_chart([{"ppl": ppl, "text": text}]).encode(x="ppl:Q")
        for (_, ppl), text in zip(static, says, strict=True)
    ]
    lines = [chart.mark_rule(strokeDash=[4, 4], color=look.grey) for chart in drawn]
    for chart, row in zip(drawn, rows, strict=True):
        words = chart.mark_text(
            align="left", color=look.grey, fontSize=font, dx=-3, dy=-6 - 1.3 * font * row
        )
        lines.append(words.encode(y=alt.value(0), text="text:N"))
    return lines


def frontiers(
    result: StudyResult,
    confidence: str,
    missing_kv: str,
    cost: Cost = "flops_pct",
    look: Look = SCREEN,
) -> alt.LayerChart:
    """PPL against FLOPs% or Compute%: a curve a recipe, and the static models."""
    best = min(ppl for _, ppl in _static_means(result))
    records = [
        record
        for record in _frontier_records(result, confidence, missing_kv)
        if record["ppl"] < LARGEST_RATIO * best
    ]
    static = [
        record for record in _static_records(result, cost) if record["ppl"] < LARGEST_RATIO * best
    ]
    tooltip = [
        alt.Tooltip("recipe:N"),
        alt.Tooltip("loss_weights:N", title="loss weights"),
        *(
            alt.Tooltip(f"{name}:Q", title=title, format=".3f")
            for name, title in (
                ("ppl", "PPL"),
                ("flops_pct", "FLOPs%"),
                ("compute_pct", "Compute%"),
                ("threshold", "threshold"),
            )
        ),
    ]
    name, counted = COSTS[cost]
    has_legend = values_of(list(dict.fromkeys(record["recipe"] for record in records))) is None
    alone = "; click a recipe in the legend to see it alone" if has_legend else ""
    axis = alt.X(f"{cost}:Q", title=f"{name} ({counted})")
    chart = cost_curves(records, static, axis, tooltip, look)
    title = f'PPL against {name}, confidence {confidence}, missing_kv = "{missing_kv}"'
    return chart.properties(
        title=look.title(title, width=chart.width),
        description=(
            "Lower and further left is better; means over the seeds at equal quantiles of the "
            "confidence. Dashed and grey: static models. Point at a curve to see its threshold "
            f"and loss weights{alone}."
        ),
    )


def measured(
    result: StudyResult, times: StudyTimes, confidence: str, look: Look = SCREEN
) -> alt.LayerChart:
    """PPL against the measured seconds of a pass: a curve a recipe, and the static models."""
    best = min(ppl for _, ppl in _static_means(result))
    static = [
        {
            "seconds_pct": entry.seconds_pct,
            "ppl": entry.ppl,
            "text": f"static {entry.layers}",
            "kind": "plain",
        }
        for entry in times.static
        if entry.ppl is not None and entry.ppl < LARGEST_RATIO * best
    ]
    records = [
        {
            "recipe": entry.label,
            "place": place,
            "seconds_pct": point.seconds_pct,
            "ppl": point.ppl,
        }
        for entry in times.routed
        if entry.confidence == confidence
        for place, point in enumerate(entry.points)
        if point.ppl < LARGEST_RATIO * best
    ]
    tooltip = [alt.Tooltip("recipe:N")]
    tooltip += [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("ppl", "seconds_pct")]
    axis = alt.X("seconds_pct:Q", title="seconds of a pass (% of the full model's)")
    shown = "Dashed: static models, timed one after the other in turns."
    if not static:
        shown = "The static models were not timed, because no run was trained for this report."
    chart = cost_curves(records, static, axis, tooltip, look)
    title = f'PPL against measured time, confidence {confidence}, missing_kv = "propagate"'
    return chart.properties(
        title=look.title(title, width=chart.width),
        description=(
            "Passes over the test text, each in percent of a full pass in the same process; "
            f"medians over the seeds. The machines may have had other work. {shown}"
        ),
    )


def _recipe_records(result: StudyResult) -> Iterator[dict[str, Any]]:
    rows = result.family(*result.families[0])
    values = values_of([row.label for row in rows]) or {}
    for row in sorted(rows, key=lambda row: (values.get(row.label, 0), row.final_ppl.mean or 0)):
        shown = [(KINDS[0], spread) for _, spread in early_exits(row)]
        shown += [(KINDS[1], row.ppl_at[result.compared_at]), (KINDS[2], row.final_ppl)]
        for kind, spread in shown:
            if spread.mean is None:
                continue
            mean, std = spread.mean, spread.std or 0.0
            yield {
                "recipe": row.label,
                "kind": kind,
                "ppl": mean,
                "low": max(mean - std, mean / 2),
                "high": mean + std,
            }


def _frontier_records(
    result: StudyResult, confidence: str, missing_kv: str
) -> Iterator[dict[str, Any]]:
    weights = {row.label: row.loss_weights for row in result.rows}
    by_label: dict[str, list[Curve]] = {}
    for run in result.runs:
        by_label.setdefault(run.label, []).append(run.curve(confidence, missing_kv))
    for label, curves in by_label.items():
        for place in range(len(curves[0].ppl)):  # at equal shares of held-out tokens
            yield {
                "recipe": label,
                "loss_weights": weights[label],
                "place": place,
                **{
                    name: float(np.mean([getattr(curve, name)[place] for curve in curves]))
                    for name in ("ppl", "flops_pct", "compute_pct")
                },
                "threshold": _finite(np.mean([curve.threshold[place] for curve in curves])),
            }


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _static_means(result: StudyResult) -> list[tuple[int, float]]:
    """(layers, mean PPL) of the plain static models, the shallowest first."""
    plain = {
        layers: float(np.mean([model.ppl for model in models]))
        for (layers, source), models in result.static_kinds.items()
        if source is None
    }
    return sorted(plain.items())


def _static_records(result: StudyResult, cost: Cost) -> Iterator[dict[str, Any]]:
    """A record of each static model, the mean over the seeds."""
    for (layers, source), models in result.static_kinds.items():
        shared = "" if source is None else f", source {source}"
        yield {
            cost: float(np.mean([getattr(model, cost) for model in models])),
            "ppl": float(np.mean([model.ppl for model in models])),
            "text": f"static {layers}{shared}",
            "kind": shared or "plain",
        }
