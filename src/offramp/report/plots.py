"""The plots of a reproduction: pure functions from the results of a corpus to an Altair chart."""

from collections.abc import Iterable

import altair as alt

from offramp.report.drawing import data_chart, layer
from offramp.report.look import SCREEN, Look, styles
from offramp.report.points import (
    MEASURED,
    PUBLISHED,
    Record,
    curve_points,
    exit_points,
    is_operating,
    measured_points,
    method_names,
    present,
    published_points,
)
from offramp.report.series import series_encodings
from offramp.report.text import Corpus

WIDTH = 760
OPEN_DIAMOND = "M0,-1.3L1.3,0L0,1.3L-1.3,0ZM0,-0.75L-0.75,0L0,0.75L0.75,0Z"
LOG_RATIO = 6.0  # PPL that spans more than this is drawn on a logarithmic axis


def frontier(
    corpus: Corpus, *, epoch: str = "best", look: Look = SCREEN, place: int = 0
) -> alt.LayerChart:
    """PPL against Compute%: a curve a method, the operating points and the published points.

    ``place`` numbers the charts that stand in one picture.
    """
    size = look.size(WIDTH, 400)
    curves, measured = curve_points(corpus, epoch), measured_points(corpus, epoch)
    published = [point for point in published_points(corpus, epoch) if point["compute"] is not None]
    points = [*measured, *published]
    colour, dash, _ = _method_styles(corpus, present(corpus, curves, points), look)
    x = alt.X("compute:Q", title="Compute% (of all layers)")
    x = x.scale(zero=False).axis(tickCount=10)
    y = _ppl_axis([*curves, *points])
    tooltip = _tooltip("method", "kind", "threshold", "ppl", "std", "compute", "shallow", "weights")
    selected = alt.selection_point(name=f"method_{place}", fields=["method"], bind="legend")
    band = (
        data_chart(_banded(curves))
        .mark_area(strokeWidth=0)
        .encode(x=x, y=_low(y), y2="high:Q", color=colour, opacity=_faded(selected, 0.1, 0.0))
    )
    line = (
        data_chart(curves)
        .mark_line(strokeWidth=look.line)
        .encode(x=x, y=y, color=colour, order="threshold:Q", tooltip=tooltip, strokeDash=dash)
        .encode(opacity=_faded(selected, 0.9))
    )
    bars = (
        data_chart(_banded(points))
        .mark_rule(strokeWidth=0.75 * look.line)
        .encode(x=x, y=_low(y), y2="high:Q", color=colour, opacity=_faded(selected, 1.0))
    )
    marks = _marks(points, colour, look).encode(x=x, y=y, tooltip=tooltip)
    marks = marks.encode(opacity=_faded(selected, 1.0))
    chart = layer(band, line, bars, marks).add_params(selected)
    return chart.properties(
        width=size[0],
        height=size[1],
        title=look.title(f"PPL against Compute%, {epoch} epoch", width=size[0]),
        description=(
            "Lower and further left is better. Each curve is one method over all thresholds; "
            "its band is the mean ± 1 standard deviation over the seeds. Circles are the measured "
            f"means at threshold {corpus['protocol']['threshold']:g}, bars the deviation. "
            f"{_diamonds(published)}Click a method in the legend to see "
            "it alone; hold shift to add another."
        ),
    )


def threshold_curves(corpus: Corpus, *, epoch: str = "best") -> alt.VConcatChart:
    """PPL and Shallow% against the threshold, with the published tables' points."""
    curves = curve_points(corpus, epoch)
    published = [p for p in published_points(corpus, epoch) if p["threshold"] is not None]
    colour, dash, _ = _method_styles(corpus, present(corpus, curves, published), SCREEN)
    x = alt.X("threshold:Q", title="threshold (probability)").scale(nice=False)
    shallow = alt.Y("shallow:Q", title="Shallow% (of the tokens)").scale(domain=[0, 100])
    tooltip = _tooltip("method", "kind", "threshold", "ppl", "std", "shallow", "compute")
    selected = alt.selection_point(fields=["method"], bind="legend")
    shared = alt.ScaleResolveMap(color="shared", shape="shared")
    panels: list[alt.LayerChart] = []
    for field, y in (("ppl", _ppl_axis([*curves, *published])), ("shallow", shallow)):
        line = (
            data_chart(curves)
            .mark_line(strokeWidth=2)
            .encode(x=x, y=y, color=colour, strokeDash=dash, tooltip=tooltip)
            .encode(opacity=_faded(selected, 0.9))
        )
        there = [point for point in published if point[field] is not None]
        marks = _marks(there, colour, SCREEN).encode(x=x, y=y, tooltip=tooltip)
        marks = marks.encode(opacity=_faded(selected, 1.0))
        panels.append(layer(line, marks).properties(width=WIDTH, height=210))
    panels[0] = panels[0].add_params(selected)  # one selection for both panels
    return alt.VConcatChart(vconcat=panels, resolve=alt.Resolve(scale=shared)).properties(
        title=f"PPL and Shallow% against the threshold, {epoch} epoch",
        description=(
            f"{_diamonds(published)}A token leaves at an exit when its confidence there is at or "
            "above the threshold."
        ),
    )


def seed_spread(corpus: Corpus) -> alt.LayerChart:
    """Each seed's PPL in every headline row, their mean, and the published figure."""
    measured = measured_points(corpus, "best")
    published = [
        point
        for point in published_points(corpus, "best")
        if is_operating(corpus, point["threshold"])
    ]
    seeds = [
        {**point, "ppl": value, "seed": seed}
        for point in measured
        for seed, value in zip(corpus["protocol"]["seeds"], point["values"], strict=True)
    ]
    names = present(corpus, measured, published)
    colour = _method_styles(corpus, names, SCREEN)[0].legend(None)
    rows = {point["method"]: point["row"] for point in (*measured, *published)}
    x = alt.X("ppl:Q", title="PPL (per token)").scale(zero=False)
    # axis labels break where "\n" stands: names are long and the page may be narrow
    y = alt.Y("row:N", title=None, sort=[rows[name] for name in names]).axis(
        labelExpr="split(datum.value, '\\n')", labelLimit=0, ticks=False, grid=True
    )
    tooltip = _tooltip("method", "kind", "ppl", "std", "threshold")
    dots = (
        data_chart(seeds)
        .mark_point(filled=True, size=55, opacity=0.65)
        .encode(x=x, y=y, color=colour, tooltip=_tooltip("method", "seed", "ppl", "threshold"))
    )
    means = (
        data_chart(measured)
        .mark_tick(thickness=3, size=26, opacity=1)
        .encode(x=x, y=y, color=colour, tooltip=tooltip)
    )
    marks = _marks(published, colour, SCREEN).encode(x=x, y=y, tooltip=tooltip)
    return layer(dots, means, marks).properties(
        width=WIDTH,
        height=46 * len(names),
        title="PPL by seed, best epoch",
        description=(
            f"Each dot is one seed, the vertical tick their mean. {_diamonds(published)}"
            "Where the dots of two rows overlap, the seed matters as much as the method."
        ),
    )


def exit_ppl(corpus: Corpus) -> alt.LayerChart:
    """PPL at each exit when every token leaves there, best epoch."""
    records = exit_points(corpus)
    names = present(corpus, records)
    colour, _, shape = _method_styles(corpus, names, SCREEN, of_lines=False)
    y = _ppl_axis(records)
    x = alt.X("exit:O", title="exit layer").axis(labelAngle=0)
    offset = alt.XOffset("method:N", sort=names).scale(paddingOuter=0.25)
    bars = (
        data_chart(_banded(records))
        .mark_rule(strokeWidth=1.5)
        .encode(x=x, xOffset=offset, y=_low(y), y2="high:Q", color=colour)
    )
    dots = (
        data_chart(records)
        .mark_point(filled=True, size=75, opacity=1)
        .encode(x=x, xOffset=offset, y=y, color=colour, shape=shape)
        .encode(tooltip=_tooltip("method", "exit", "ppl", "std"))
    )
    return layer(bars, dots).properties(
        width=WIDTH,
        height=300,
        title="PPL at each exit, best epoch",
        description=(
            "PPL when every token leaves at the same exit. Bars are ± 1 standard deviation "
            "over the seeds."
        ),
    )


def _banded(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if "low" in record]


def _faded(selected: alt.Parameter, opacity: float, hidden: float = 0.12) -> alt.OpacityValue:
    """Full opacity for the methods selected in the legend, or for all if none is selected."""
    return alt.OpacityValue(hidden, condition={"param": selected.name, "value": opacity})


def _marks(points: list[Record], colour: alt.Color, look: Look) -> alt.Chart:
    """Full circles for measured points, open diamonds for published ones, with a legend."""
    shapes = {MEASURED: "circle", PUBLISHED: OPEN_DIAMOND}
    kinds = [kind for kind in shapes if any(point["kind"] == kind for point in points)]
    grey = look.grey  # methods have colours, kinds have shapes
    shape = alt.Shape("kind:N", title=None).scale(
        domain=kinds, range=[shapes[kind] for kind in kinds]
    )
    legend = alt.Legend(
        orient="top" if look.legend == "right" else "bottom",
        labelLimit=0,
        symbolSize=4 * look.point,
        symbolFillColor=grey,
        symbolStrokeColor="transparent",
        symbolOpacity=1,
    )
    chart: alt.Chart = (
        data_chart(points)
        .mark_point(filled=True, size=4 * look.point, opacity=1)
        .encode(shape=shape.legend(legend), color=colour)
    )
    return chart


def _diamonds(published: list[Record]) -> str:
    return "Diamonds are the seed document's published figures. " if published else ""


def _method_styles(
    corpus: Corpus, names: list[str], look: Look, *, of_lines: bool = True
) -> tuple[alt.Color, alt.StrokeDash, alt.Shape]:
    """A method's colour, line style and shape, the same in every chart of the corpus.

    The legend shows colour and line style, or colour and shape if ``of_lines`` is False.
    """
    given = styles(method_names(corpus), look)
    colour, dash, shape = series_encodings(names, given, by="method", look=look)
    legend = alt.Legend(
        orient="top", columns=look.columns, labelLimit=300 * look.scale, symbolOpacity=1
    )
    if of_lines:
        legend.symbolType, legend.symbolSize = "stroke", 12 * look.point
        legend.symbolStrokeWidth = look.line
        return colour.legend(legend), dash.legend(legend), shape.legend(None)
    return colour.legend(legend), dash, shape.legend(legend)


def _ppl_axis(records: Iterable[Record]) -> alt.Y:
    """A PPL axis that fits these records; logarithmic where they span too much."""
    values = [record[key] for record in records for key in ("ppl", "low", "high") if key in record]
    wide = bool(values) and max(values) > LOG_RATIO * min(values)
    axis = alt.Y("ppl:Q", title="PPL (per token; logarithmic axis)" if wide else "PPL (per token)")
    return (
        axis.scale(type="log", domain=[min(values) * 0.85, max(values) * 1.15]).axis(tickCount=8)
        if wide
        else axis.scale(zero=False)
    )


def _low(y: alt.Y) -> alt.Y:
    """The same axis, for the lower edge of a band."""
    lower = y.copy()
    lower.shorthand = "low:Q"
    return lower


def _tooltip(*fields: str) -> list[alt.Tooltip]:
    titles = {"ppl": "PPL", "std": "std of PPL", "compute": "Compute%", "shallow": "Shallow%"}
    formats = {"ppl": ".2f", "std": ".2f", "compute": ".1f", "shallow": ".1f", "threshold": ".2f"}
    return [
        alt.Tooltip(f"{field}:Q", title=titles.get(field, field), format=formats[field])
        if field in formats
        else alt.Tooltip(f"{field}:N", title=titles.get(field, field))
        for field in fields
    ]
