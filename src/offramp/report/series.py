"""Curves of a chart: each with a colour, a line style and a point shape of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from offramp.report.drawing import data_chart
from offramp.report.labels import Label, Placed, Point, place
from offramp.report.look import Look, Style, styles

Record = dict[str, Any]
MARKS = 7
"""Number of marks on a curve of many points, at most."""
Domain = tuple[float, float]


def curves(
    records: Sequence[Record],
    names: Sequence[str],
    *,
    by: str,
    x: alt.X,
    y: alt.Y,
    look: Look,
    order: str,
    colours: Sequence[str] | None = None,
    legend: bool = True,
    tooltip: Sequence[alt.Tooltip] = (),
    **encodings: Any,
) -> list[alt.Chart]:
    """Return the lines of series and marks on them, as two layers.

    Parameters
    ----------
    records
        Points of the curves, each curve's in order.
    names
        The series, in the order of the legend; ``by`` is the field of their names.
    order
        The field that orders the points of a curve.
    colours
        Colours of the series in place of the theme's.
    legend
        Whether a legend shows colour and shape.
    """
    given = styles(names, look, colours)
    colour, dash, shape = series_encodings(names, given, by=by, look=look, legend=legend)
    shared = {"x": x, "y": y, "color": colour, "tooltip": list(tooltip), **encodings}
    line = data_chart(list(records)).mark_line(strokeWidth=look.line)
    line = line.encode(order=alt.Order(f"{order}:Q"), strokeDash=dash, **shared)
    marks = data_chart(marked(records, names, by))
    marks = marks.mark_point(filled=True, size=look.point, opacity=1).encode(shape=shape, **shared)
    return [line, marks]


def series_encodings(
    names: Sequence[str], given: Mapping[str, Style], *, by: str, look: Look, legend: bool = True
) -> tuple[alt.Color, alt.StrokeDash, alt.Shape]:
    """The encodings of series, with one legend of their colours and shapes."""
    shown = look.legend_of(names, symbolOpacity=1, symbolStrokeWidth=0) if legend else None
    domain, chosen = list(names), [given[name] for name in names]
    colour = alt.Color(f"{by}:N", title=None, legend=shown)
    dash = alt.StrokeDash(f"{by}:N", title=None, legend=shown)
    shape = alt.Shape(f"{by}:N", title=None, legend=shown)
    return (
        colour.scale(domain=domain, range=[style.colour for style in chosen]),
        dash.scale(domain=domain, range=[list(style.dash) for style in chosen]),
        shape.scale(domain=domain, range=[style.shape for style in chosen]),
    )


def marked(records: Sequence[Record], names: Sequence[str], by: str) -> list[Record]:
    """The points of curves that have a mark: all of a short curve, a few of a long one.

    Curves that run together have their marks at different points.
    """
    of: dict[str, list[Record]] = {name: [] for name in names}
    for record in records:
        of[record[by]].append(record)
    found: list[Record] = []
    for number, points in enumerate(of.values()):
        every = max(1, -(-len(points) // MARKS))
        found += points[number % every :: every]
    return found


def domain_of(values: Sequence[float], room: float = 0.05) -> Domain:
    """The range of an axis that shows these values, with some room on both sides."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    beyond = room * (high - low) or room * abs(low) or room
    return low - beyond, high + beyond


class Plane:
    """The plane of a plot with linear axes: from data to pixels and back."""

    def __init__(self, x: tuple[str, Domain], y: tuple[str, Domain], size: tuple[float, float]):
        """Take each axis as a field's name with its domain, and the plot's size in pixels."""
        (self.x, self.across), (self.y, self.up) = x, y
        self.size = size

    def at(self, record: Mapping[str, Any]) -> Point:
        """Where a record is, in pixels from the upper left corner."""
        (left, right), (bottom, top) = self.across, self.up
        width, height = self.size
        return (
            (record[self.x] - left) / (right - left) * width,
            (top - record[self.y]) / (top - bottom) * height,
        )

    def record(self, point: Point, names: tuple[str, str] = ("x", "y")) -> Record:
        """The values at a place in pixels."""
        (left, right), (bottom, top) = self.across, self.up
        x = left + point[0] / self.size[0] * (right - left)
        return {names[0]: x, names[1]: top - point[1] / self.size[1] * (top - bottom)}


def label_records(
    labels: Sequence[tuple[Record, Sequence[Mapping[str, Any]]]],
    lines: Sequence[Sequence[Mapping[str, Any]]],
    plane: Plane,
    font: float,
) -> list[Record | None]:
    """Return records for ``label_layers``; None for a label that finds no room.

    Each label is a record with ``text``, and the points that it may stand at, the best first.
    """
    paths = [[plane.at(point) for point in line] for line in lines]
    found: list[Placed | None] = place(
        [
            Label(text=record["text"], anchors=[plane.at(point) for point in anchors])
            for record, anchors in labels
        ],
        lines=paths,
        points=[point for path in paths for point in path],
        size=plane.size,
        font=font,
    )
    records: list[Record | None] = []
    for (record, _), placed in zip(labels, found, strict=True):
        if placed is None:
            records.append(None)
            continue
        box = placed.box
        centre = ((box.left + box.right) / 2, (box.top + box.bottom) / 2)
        leader = {}
        if placed.has_leader:
            leader = plane.record(placed.anchor, ("from_x", "from_y"))
            leader |= plane.record(placed.end, ("to_x", "to_y"))
        records.append({**record, **plane.record(centre), **leader})
    return records


def label_layers(
    records: Sequence[Record], x: alt.X, y: alt.Y, look: Look, colour: Any
) -> list[alt.Chart]:
    """The texts of labels, and the thin lines from those that are far from their points."""
    words = data_chart(list(records)).mark_text(fontSize=look.font_size, baseline="middle")
    words = words.encode(x=_on(x, "x"), y=_on(y, "y"), text="text:N", color=colour)
    far = [record for record in records if "from_x" in record]
    leaders = data_chart(far).mark_rule(strokeWidth=0.4 * look.line, opacity=0.7)
    leaders = leaders.encode(x=_on(x, "from_x"), y=_on(y, "from_y"), color=colour)
    return [words, leaders.encode(x2="to_x:Q", y2="to_y:Q")]


def _on(axis: Any, field: str) -> Any:
    """The same axis for another field."""
    same = axis.copy()
    same.shorthand = f"{field}:Q"
    return same
