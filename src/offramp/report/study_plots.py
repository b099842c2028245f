"""The plots of a study: pure functions from its result to an Altair chart."""

from collections.abc import Iterator
from typing import Any, Literal

import altair as alt
import numpy as np

from offramp.report.order import colours_of, labels_at_ends, values_of
from offramp.report.plots import PALETTE, WIDTH, data_chart, layer
from offramp.report.study_result import Curve, StudyResult, StudyTimes
from offramp.report.study_tables import early_exits

GREY = "#808080"
KINDS = ("exit", "routed", "last layer")
Cost = Literal["flops_pct", "compute_pct"]
COSTS: dict[Cost, tuple[str, str]] = {
    "flops_pct": ("FLOPs%", "heads and gates counted"),
    "compute_pct": ("Compute%", "layers only"),
}
LARGEST_RATIO = 1.5  # to the best PPL; worse ones are left out of the picture of a frontier


def recipes(result: StudyResult) -> alt.LayerChart:
    """PPL of each recipe's exits, routed, and of its last layer; the static models as lines."""
    records = list(_recipe_records(result))
    order = list(dict.fromkeys(record["recipe"] for record in records))
    title = "PPL (logarithmic axis)"
    y = alt.Y("recipe:N", sort=order, title=None).axis(labelLimit=0)
    x = alt.X("ppl:Q", title=title).scale(type="log", nice=False, padding=12)
    colour = alt.Color("kind:N", title=None).scale(domain=list(KINDS), range=list(PALETTE[:3]))
    colour = colour.legend(alt.Legend(orient="top", labelLimit=0))
    tooltip = [alt.Tooltip("recipe:N"), alt.Tooltip("kind:N"), alt.Tooltip("ppl:Q", format=".3f")]
    base = data_chart(records)
    marks = base.mark_point(filled=True, size=90, opacity=1)
    marks = marks.encode(x=x, y=y, color=colour, tooltip=tooltip)
    bars = base.mark_rule(strokeWidth=2).encode(y=y, color=colour, x2="high:Q")
    bars = bars.encode(x=alt.X("low:Q", title=title).scale(type="log"))
    says = [str(layers) for layers, _ in _static_means(result)]
    says[0] += " (layers of a static model)"
    static = [
        {"ppl": ppl, "text": text}
        for (_, ppl), text in zip(_static_means(result), says, strict=True)
    ]
    lines = data_chart(static)
    rules = lines.mark_rule(strokeDash=[4, 4], color=GREY).encode(x="ppl:Q")
    words = lines.mark_text(align="left", dx=-3, dy=-6, color=GREY)
    words = words.encode(x="ppl:Q", y=alt.value(0), text="text:N")
    return layer(rules, words, bars, marks).properties(
        width=WIDTH,
        height=24 * len(order),
        title=result.question,
        description=(
            "The PPL if every token leaves at the exit, the routed PPL at "
            f"{result.compared_at:g}% of FLOPs, and the PPL of the last layer; means over the "
            "seeds ± 1 standard deviation. Dashed: static models with that number of layers."
        ),
    )


def frontiers(
    result: StudyResult, confidence: str, missing_kv: str, cost: Cost = "flops_pct"
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
    return curves(records, static, axis, tooltip).properties(
        title=f'PPL against {name}, confidence {confidence}, missing_kv = "{missing_kv}"',
        description=(
            "Lower and further left is better; means over the seeds at equal quantiles of the "
            "confidence. Dashed and grey: static models. Point at a curve to see its threshold "
            f"and loss weights{alone}."
        ),
    )


def measured(result: StudyResult, times: StudyTimes, confidence: str) -> alt.LayerChart:
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
    axis = alt.X("seconds_pct:Q", title="seconds of a pass, % of the full model's")
    shown = "Dashed: static models, timed one after the other in turns."
    if not static:
        shown = "The static models were not timed, because no run was trained for this report."
    return curves(records, static, axis, tooltip).properties(
        title=f'PPL against measured time, confidence {confidence}, missing_kv = "propagate"',
        description=(
            "Passes over the test text, each in percent of a full pass in the same process; "
            f"medians over the seeds. The machines may have had other work. {shown}"
        ),
    )


def curves(records: Any, static: Any, axis: alt.X, tooltip: Any) -> alt.LayerChart:
    """PPL against a cost: a curve a recipe, and a dashed one for each kind of static models."""
    names = list(dict.fromkeys(record["recipe"] for record in records))
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(names))]
    dashes = [[1, 0] if i < len(PALETTE) else [6, 3] for i in range(len(names))]
    legend: alt.Legend | None = alt.Legend(orient="right", labelLimit=0, symbolType="stroke")
    values = values_of(names)
    if values is not None:  # one hue after the other, and labels instead of a legend
        colours, legend = colours_of(names, values), None
        dashes = [[1, 0] if name in values else [6, 3] for name in names]
    colour: Any = {"title": None, "legend": legend}
    dash = colour | {"scale": alt.Scale(domain=names, range=dashes)}
    colour |= {"scale": alt.Scale(domain=names, range=colours)}
    selected = alt.selection_point(fields=["recipe"], bind="legend")
    x = axis.scale(zero=False)
    domain = _domain([*records, *static])
    y = alt.Y("ppl:Q", title="PPL").scale(zero=False, domain=domain, nice=False)
    lines = (
        data_chart(records)
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18))
        .encode(x=x, y=y, tooltip=tooltip, order="place:Q")
        .encode(color=alt.Color("recipe:N", **colour))
        .encode(strokeDash=alt.StrokeDash("recipe:N", **dash))
        .encode(opacity=alt.when(selected).then(alt.value(0.9)).otherwise(alt.value(0.1)))
    )
    dashed = data_chart(static).mark_line(color=GREY, strokeDash=[5, 4], point={"color": GREY})
    dashed = dashed.encode(x=x, y=y, tooltip=[alt.Tooltip("text:N"), alt.Tooltip("ppl:Q")])
    dashed = dashed.encode(detail="kind:N")
    words = data_chart(static).mark_text(dx=-5, dy=10, align="right", color=GREY)
    charts = [dashed, words.encode(x=x, y=y, text="text:N"), lines]
    if values is not None:
        ends, left = labels_at_ends(records, str(axis.shorthand).split(":")[0], values, domain)
        beside: Any = {"align": "right", "dx": -6} if left else {"align": "left", "dx": 6}
        labels = data_chart(ends).mark_text(fontSize=11, **beside)
        text_colour = alt.Color("recipe:N", **colour)
        charts.append(labels.encode(x=x, y=y, text="text:N", color=text_colour))
    return layer(*charts).add_params(selected).properties(width=WIDTH, height=420)


def _domain(records: Any) -> tuple[float, float]:
    """The PPL that a plot shows, with some room above and below."""
    ppls = [record["ppl"] for record in records] or [1.0]
    low, high = min(ppls), max(ppls)
    room = 0.05 * (high - low) or 0.05 * low
    return low - room, high + room


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
