"""The plots of a reproduction: pure functions from the results of a corpus to an Altair chart."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from offramp.files import replacing
from offramp.printable import printable
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
from offramp.report.text import Corpus, Number

# Okabe and Ito's colours for the colour-blind, moved a little to be read on white and on black
PALETTE = ("#2487c7", "#e08e00", "#0a9e77", "#c56a9c", "#d9601a", "#7d7dd6", "#8a8a8a", "#a8901f")
WIDTH = 760
OPEN_DIAMOND = "M0,-1.3L1.3,0L0,1.3L-1.3,0ZM0,-0.75L-0.75,0L0,0.75L0.75,0Z"
LOG_RATIO = 6.0  # PPL that spans more than this is drawn on a logarithmic axis


def frontier(corpus: Corpus, *, epoch: str = "best") -> alt.LayerChart:
    """PPL against Compute%: a curve a method, the operating points and the published points."""
    curves, measured = curve_points(corpus, epoch), measured_points(corpus, epoch)
    published = [point for point in published_points(corpus, epoch) if point["compute"] is not None]
    points = [*measured, *published]
    colour = _colour(corpus, present(corpus, curves, points))
    x = alt.X("compute:Q", title="Compute% (layers run / layers in the model)")
    x = x.scale(zero=False).axis(tickCount=10)
    y = _ppl_axis([*curves, *points])
    tooltip = _tooltip("method", "kind", "threshold", "ppl", "std", "compute", "shallow", "weights")
    selected = alt.selection_point(fields=["method"], bind="legend")
    band = (
        data_chart(_banded(curves))
        .mark_area(strokeWidth=0)
        .encode(x=x, y=_low(y), y2="high:Q", color=colour, opacity=_faded(selected, 0.1, 0.0))
    )
    line = (
        data_chart(curves)
        .mark_line(strokeWidth=2)
        .encode(x=x, y=y, color=colour, order="threshold:Q", tooltip=tooltip)
        .encode(opacity=_faded(selected, 0.9))
    )
    bars = (
        data_chart(_banded(points))
        .mark_rule(strokeWidth=1.5)
        .encode(x=x, y=_low(y), y2="high:Q", color=colour, opacity=_faded(selected, 1.0))
    )
    marks = _marks(points, colour).encode(x=x, y=y, tooltip=tooltip, opacity=_faded(selected, 1.0))
    chart = layer(band, line, bars, marks).add_params(selected)
    return chart.properties(
        width=WIDTH,
        height=400,
        title=f"PPL against Compute%, {epoch} epoch",
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
    colour = _colour(corpus, present(corpus, curves, published))
    x = alt.X("threshold:Q", title="Threshold").scale(nice=False)
    shallow = alt.Y("shallow:Q", title="Shallow%").scale(domain=[0, 100])
    tooltip = _tooltip("method", "kind", "threshold", "ppl", "std", "shallow", "compute")
    selected = alt.selection_point(fields=["method"], bind="legend")
    shared = alt.ScaleResolveMap(color="shared", shape="shared")
    panels: list[alt.LayerChart] = []
    for field, y in (("ppl", _ppl_axis([*curves, *published])), ("shallow", shallow)):
        line = (
            data_chart(curves)
            .mark_line(strokeWidth=2)
            .encode(x=x, y=y, color=colour, tooltip=tooltip, opacity=_faded(selected, 0.9))
        )
        marks = _marks([point for point in published if point[field] is not None], colour).encode(
            x=x, y=y, tooltip=tooltip, opacity=_faded(selected, 1.0)
        )
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
    colour = _colour(corpus, names).legend(None)
    rows = {point["method"]: point["row"] for point in (*measured, *published)}
    x = alt.X("ppl:Q", title="PPL").scale(zero=False)
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
    marks = _marks(published, colour).encode(x=x, y=y, tooltip=tooltip)
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
    colour, y = _colour(corpus, names), _ppl_axis(records)
    x = alt.X("exit:O", title="Exit layer").axis(labelAngle=0)
    offset = alt.XOffset("method:N", sort=names).scale(paddingOuter=0.25)
    bars = (
        data_chart(_banded(records))
        .mark_rule(strokeWidth=1.5)
        .encode(x=x, xOffset=offset, y=_low(y), y2="high:Q", color=colour)
    )
    dots = (
        data_chart(records)
        .mark_point(filled=True, size=75, opacity=1)
        .encode(x=x, xOffset=offset, y=y, color=colour)
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


def save_png(chart: alt.TopLevelMixin, path: Path, scale: Number = 2) -> None:
    """Write a chart as a PNG image, `scale` pixels to a unit, completely or not at all."""
    png = vl_convert.vegalite_to_png(spec_of(chart), vl_version=vegalite_version(), scale=scale)
    with replacing(path) as aside:
        aside.write_bytes(png)


def spec_of(chart: Any) -> dict[str, Any]:
    """The Vega-Lite specification of a chart; the control characters of its texts are shown."""
    spec: dict[str, Any] = _printable(chart.to_dict())
    return spec


def _printable(part: Any) -> Any:
    if isinstance(part, dict):
        return {_printable(key): _printable(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_printable(value) for value in part]
    return printable(part, lines=True) if isinstance(part, str) else part


def vegalite_version() -> str:
    """The Vega-Lite version that Altair writes for, as vl-convert names it."""
    return ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])


def data_chart(records: list[Record]) -> alt.Chart:
    """A chart of flat records."""
    return alt.Chart(alt.InlineData(values=records))


def layer(*charts: alt.Chart) -> alt.LayerChart:
    """One chart of those charts that have data."""
    drawn = [chart for chart in charts if chart.data.values]
    return alt.LayerChart(layer=drawn or [charts[0]])


def _banded(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if "low" in record]


def _faded(selected: alt.Parameter, opacity: float, hidden: float = 0.12) -> alt.OpacityValue:
    """Full opacity for the methods selected in the legend, or for all if none is selected."""
    return alt.OpacityValue(hidden, condition={"param": selected.name, "value": opacity})


def _marks(points: list[Record], colour: alt.Color) -> alt.Chart:
    """Full circles for measured points, open diamonds for published ones, with a legend."""
    shapes = {MEASURED: "circle", PUBLISHED: OPEN_DIAMOND}
    kinds = [kind for kind in shapes if any(point["kind"] == kind for point in points)]
    grey = "#808080"  # methods have colours, kinds have shapes
    shape = alt.Shape("kind:N", title=None).scale(
        domain=kinds, range=[shapes[kind] for kind in kinds]
    )
    legend = alt.Legend(
        orient="top",
        labelLimit=0,
        symbolSize=150,
        symbolFillColor=grey,
        symbolStrokeColor="transparent",
        symbolOpacity=1,
    )
    chart: alt.Chart = (
        data_chart(points)
        .mark_point(filled=True, size=150, opacity=1)
        .encode(shape=shape.legend(legend), color=colour)
    )
    return chart


def _diamonds(published: list[Record]) -> str:
    return "Diamonds are the seed document's published figures. " if published else ""


def _colour(corpus: Corpus, names: list[str]) -> alt.Color:
    """A method's colour, the same in every chart of the corpus."""
    everyone = method_names(corpus)
    colours = [PALETTE[everyone.index(name) % len(PALETTE)] for name in names]
    legend = alt.Legend(orient="top", columns=2, labelLimit=0, symbolType="circle", symbolOpacity=1)
    scale = alt.Scale(domain=names, range=colours)
    return alt.Color("method:N", title=None, scale=scale, legend=legend)


def _ppl_axis(records: Iterable[Record]) -> alt.Y:
    """A PPL axis that fits these records; logarithmic where they span too much."""
    values = [record[key] for record in records for key in ("ppl", "low", "high") if key in record]
    wide = bool(values) and max(values) > LOG_RATIO * min(values)
    axis = alt.Y("ppl:Q", title="PPL (logarithmic axis)" if wide else "PPL")
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
