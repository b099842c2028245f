"""PPL against a cost: the curves of a study's recipes and its static models, with labels."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import altair as alt

from offramp.report.drawing import data_chart, layer
from offramp.report.look import STATIC_DASHES, Look
from offramp.report.order import colours_of, values_of
from offramp.report.series import (
    Plane,
    Record,
    curves,
    domain_of,
    label_layers,
    label_records,
)

SIZE = (760, 420)
STATIC_SHAPES = ("circle", "square", "diamond")


def cost_curves(
    records: Sequence[Record],
    static: Sequence[Record],
    axis: alt.X,
    tooltip: Sequence[alt.Tooltip],
    look: Look,
) -> alt.LayerChart:
    """PPL against a cost: a curve a recipe, and a grey one for each kind of static models.

    Recipes whose labels differ in a number only have labels beside their curves, if all of them
    find room; others have a legend.
    """
    cost = str(axis.shorthand).split(":")[0]
    names = list(dict.fromkeys(record["recipe"] for record in records))
    values = values_of(names)
    size = look.size(*SIZE)
    every = [*records, *static]
    across = domain_of([record[cost] for record in every], 0.04)
    up = domain_of([record["ppl"] for record in every])
    x = axis.scale(domain=across, nice=False, zero=False)
    y = alt.Y("ppl:Q", title="PPL (per token)").scale(zero=False, domain=up, nice=False)
    by_name = _grouped(records, "recipe")
    kinds = _grouped(static, "kind")
    lines = [sorted(points, key=lambda p: p[cost]) for points in kinds.values()]
    lines += [sorted(points, key=lambda p: p["place"]) for points in by_name.values()]
    wanted: list[tuple[Record, list[Record]]] = [(dict(record), [record]) for record in static]
    if values is not None:
        wanted += [
            ({"recipe": name, "text": text}, _anchors(by_name, name, cost))
            for name, text in _texts(names, values).items()
        ]
    plane = Plane((cost, across), ("ppl", up), size)
    placed = label_records(wanted, lines, plane, look.font_size)
    beside = placed[len(static) :]
    labelled = values is not None and None not in beside
    colours = colours_of(names, values or {}, look) if values is not None else None
    selected = alt.selection_point(fields=["recipe"], bind="legend")
    opacity = alt.when(selected).then(alt.value(0.95)).otherwise(alt.value(0.1))
    drawn = curves(
        records,
        names,
        by="recipe",
        x=x,
        y=y,
        look=look,
        order="place",
        colours=colours,
        legend=not labelled,
        tooltip=tooltip,
        opacity=opacity,
    )
    static_words = [record for record in placed[: len(static)] if record is not None]
    charts = [*_static_layers(kinds, x, y, look), *drawn]
    charts += label_layers(static_words, x, y, look, alt.value(look.grey))
    if labelled:
        colour = drawn[0].encoding.color
        charts += label_layers([record for record in beside if record], x, y, look, colour)
    chart = layer(*charts).add_params(selected)
    return chart.properties(width=size[0], height=size[1])


def _static_layers(
    kinds: Mapping[str, Sequence[Record]], x: alt.X, y: alt.Y, look: Look
) -> list[alt.Chart]:
    """Grey lines and points, of a style of its own for each kind of static models."""
    found = []
    shared: dict[str, Any] = {
        "x": x,
        "y": y,
        "tooltip": [alt.Tooltip("text:N"), alt.Tooltip("ppl:Q")],
    }
    for place, records in enumerate(kinds.values()):
        dash = list(STATIC_DASHES[place % len(STATIC_DASHES)])
        shape = STATIC_SHAPES[place % len(STATIC_SHAPES)]
        base = data_chart(list(records)).encode(**shared)
        found.append(base.mark_line(color=look.grey, strokeWidth=look.line, strokeDash=dash))
        marks: dict[str, Any] = {
            "color": look.grey,
            "shape": shape,
            "size": look.point,
            "opacity": 1,
        }
        found.append(base.mark_point(filled=True, **marks))
    return found


def _grouped(records: Sequence[Record], by: str) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record[by], []).append(record)
    return found


def _texts(names: Sequence[str], values: Mapping[str, float]) -> dict[str, str]:
    """What the labels say: the numbers of ordered recipes, and the whole name of the least."""
    least = min(values, key=values.__getitem__)
    whole = {name for name in names if name not in values} | {least}
    return {name: name if name in whole else f"{values[name]:g}" for name in names}


def _anchors(by_name: Mapping[str, Sequence[Record]], name: str, cost: str) -> list[Record]:
    """The points of a curve, beginning at the end at which the curves differ most."""
    gaps = {}
    for pick in (min, max):
        heights = sorted(pick(points, key=lambda p: p[cost])["ppl"] for points in by_name.values())
        between = sorted(high - low for low, high in pairwise(heights))
        gaps[pick] = between[len(between) // 2] if between else 0.0
    return sorted(by_name[name], key=lambda p: p[cost], reverse=gaps[max] > gaps[min])
