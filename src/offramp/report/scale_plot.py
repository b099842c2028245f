"""The plot of the study ``scale``: ratio of PPLs against the number of parameters."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import altair as alt

from offramp.report.drawing import data_chart, layer
from offramp.report.look import SCREEN, Look
from offramp.report.scale_result import OnLine, ScaleResult, millions

SIZE = (760, 420)
WIDEST = (0.6, 1.4)
"""Ratios that the axis shows at most; an interval that goes beyond them is cut."""

_EXTRAPOLATED = "extrapolated"


def ratios(result: ScaleResult, look: Look = SCREEN) -> alt.LayerChart:
    """A point a seed, the line with its 95% band, and the line beyond the sizes, dashed."""
    points = list(_points(result))
    curve = result.fit.curve if result.fit else ()
    largest = max((size.parameters for size in result.sizes), default=0)
    line = [_on_line(at) for at in curve if at.parameters <= largest]
    beyond = [_on_line(at) for at in curve if at.parameters >= largest]
    domain = _domain([*points, *line, *beyond])
    title = f"ratio of PPLs at {result.compared_at:g}% of FLOPs (early exit / static)"
    x = alt.X("millions:Q", title="parameters (millions, logarithmic axis)")
    x = x.scale(type="log", nice=False, padding=12).axis(format=".2~r")
    y = alt.Y("ratio:Q", title=title).scale(domain=domain, zero=False, nice=False, clamp=True)
    colour, dashed = look.palette[0], look.palette[1]
    width, height = look.size(*SIZE)
    drawn = [
        *_band(beyond, x, dashed, 0.10, "from", "to"),
        *_band(line, x, colour, 0.18, "low", "high"),
        _rule(look),
        data_chart(beyond)
        .mark_line(strokeWidth=look.line, strokeDash=[6, 4], color=dashed)
        .encode(x=x, y=y),
        data_chart(line).mark_line(strokeWidth=look.line, color=colour).encode(x=x, y=y),
        data_chart(points)
        .mark_point(filled=True, size=2 * look.point, opacity=1, color=colour)
        .encode(x=x, y=y, tooltip=_tooltip()),
        *_label(result, x, y, dashed, look),
    ]
    return layer(*drawn).properties(
        width=width,
        height=height,
        title=look.title(result.question, width=width),
        description=_described(result),
    )


def _described(result: ScaleResult) -> str:
    said = "A point a seed; below 1, the early-exit model is better than static models."
    if result.fit is None:
        return said
    return (
        f"{said} The line is fitted to the logs of both, with its 95% interval. Dashed, with the "
        "95% interval for one more seed: extrapolated beyond the largest size, not measured."
    )


def _points(result: ScaleResult) -> Sequence[dict[str, Any]]:
    return [
        {
            "millions": size.parameters / 1e6,
            "ratio": ratio,
            "seed": seed,
            "width": size.width,
            "epochs": size.epochs,
        }
        for size in result.sizes
        for seed, ratio in zip(result.seeds, size.to_static.values, strict=True)
        if ratio is not None
    ]


def _on_line(at: OnLine) -> dict[str, Any]:
    """A point of the line: its own interval (low, high), and that of one more seed (from, to)."""
    low, high = at.interval or (None, None)
    start, end = at.prediction or (None, None)
    bounds = {"low": low, "high": high, "from": start, "to": end}
    least, most = WIDEST
    return {
        "millions": at.parameters / 1e6,
        "ratio": at.ratio,
        **{
            name: min(max(value, least), most)
            for name, value in bounds.items()
            if value is not None
        },
    }


def _domain(records: Sequence[dict[str, Any]]) -> list[float]:
    names = ("ratio", "low", "high", "from", "to")
    values = [record[name] for record in records for name in names if name in record]
    known = [value for value in values if isfinite(value)]
    low, high = min([*known, 0.98]), max([*known, 1.02])
    return [max(low - 0.01, WIDEST[0] - 0.01), min(high + 0.01, WIDEST[1] + 0.01)]


def _band(
    records: Sequence[dict[str, Any]], x: alt.X, colour: str, opacity: float, low: str, high: str
) -> list[alt.Chart]:
    known = [record for record in records if low in record]
    area = data_chart(known).mark_area(color=colour, opacity=opacity, clip=True)
    return [area.encode(x=x, y=alt.Y(f"{low}:Q"), y2=f"{high}:Q")] if known else []


def _rule(look: Look) -> alt.Chart:
    rule = data_chart([{"ratio": 1.0}]).mark_rule(color=look.grey, strokeDash=[2, 2])
    drawn: alt.Chart = rule.encode(y="ratio:Q")
    return drawn


def _label(result: ScaleResult, x: alt.X, y: alt.Y, colour: str, look: Look) -> list[alt.Chart]:
    """The extrapolated ratio, in words beside the end of the line."""
    if result.fit is None:
        return []
    at = result.fit.extrapolated
    text = f"{millions(at.parameters)}: {at.ratio:.3f} ({_EXTRAPOLATED})"
    record = {"millions": at.parameters / 1e6, "ratio": at.ratio, "text": text}
    words = data_chart([record]).mark_text(
        align="right", dx=-4, dy=-1.2 * look.font_size, color=colour, fontSize=look.font_size
    )
    return [words.encode(x=x, y=y, text="text:N")]


def _tooltip() -> list[alt.Tooltip]:
    numbers = ("ratio", ".3f"), ("millions", ".2f"), ("epochs", ".1f")
    counts = [alt.Tooltip(f"{name}:Q") for name in ("width", "seed")]
    return [*(alt.Tooltip(f"{name}:Q", format=digits) for name, digits in numbers), *counts]
