"""From a chart to its Vega-Lite specification, and to a picture in a file."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from offramp.errors import ConfigError
from offramp.files import replacing
from offramp.printable import printable
from offramp.report.look import Look

ROUNDS = 6
"""Number of times that a chart is drawn, at most, to find the size of its plots."""
LEAST_INNER = 30.0
"""Least width and height of a plot without its axes and labels."""


def data_chart(records: list[dict[str, Any]]) -> alt.Chart:
    """A chart of flat records."""
    return alt.Chart(alt.InlineData(values=records))


def layer(*charts: alt.Chart) -> alt.LayerChart:
    """One chart of those charts that have data."""
    drawn = [chart for chart in charts if chart.data.values]
    return alt.LayerChart(layer=drawn or [charts[0]])


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


def save_chart(chart: Any, path: Path, pixels: float = 2) -> None:
    """Write a chart as PNG, SVG or PDF, by the name's ending; whole or not at all.

    ``pixels`` is the number of pixels of a PNG for each unit of length.
    """
    data = _drawn(spec_of(chart), path.suffix.lower(), pixels)
    with replacing(path) as aside:
        aside.write_bytes(data)


def save_png(chart: Any, path: Path, scale: float = 2) -> None:
    """Write a chart as a PNG image, `scale` pixels to a unit, completely or not at all."""
    png = vl_convert.vegalite_to_png(spec_of(chart), vl_version=vegalite_version(), scale=scale)
    with replacing(path) as aside:
        aside.write_bytes(png)


def _drawn(spec: dict[str, Any], ending: str, pixels: float) -> bytes:
    version = vegalite_version()
    try:
        if ending == ".svg":
            return vl_convert.vegalite_to_svg(spec, vl_version=version).encode()
        if ending == ".pdf":
            pdf: bytes = vl_convert.vegalite_to_pdf(spec, vl_version=version)
            return pdf
        png: bytes = vl_convert.vegalite_to_png(spec, vl_version=version, scale=pixels)
        return png
    except ValueError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"file: expected a result with something to draw: {reason}") from None


def picture_size(chart: Any) -> tuple[float, float]:
    """The width and height of the whole picture of a chart, with its axes and legends."""
    svg = _drawn(spec_of(chart), ".svg", 1)[:2000].decode(errors="replace")
    found = [re.search(rf'<svg[^>]*\b{name}="([\d.]+)"', svg) for name in ("width", "height")]
    width, height = (float(match[1]) if match else 0.0 for match in found)
    return width, height


def fitted(
    draw: Callable[[Look], Any], look: Look, width: float | None, height: float | None
) -> Any:
    """Return the chart whose whole picture has this width and height; None leaves one free.

    Labels and axes decide how much room a plot has, so the chart is drawn a few times.
    """
    sides = [
        _Side(name, wanted)
        for name, wanted in (("width", width), ("height", height))
        if wanted is not None
    ]
    chart = None
    for _ in range(ROUNDS):
        inner = {side.name: side.inner for side in sides}
        chart = draw(look.sized(inner.get("width"), inner.get("height")))
        size = dict(zip(("width", "height"), picture_size(chart), strict=True))
        if all(abs(side.wanted - size[side.name]) <= 1 for side in sides):
            break
        for side in sides:
            side.learn(size[side.name])
    return chart


class _Side:
    """The search for the inner width or height of which a picture's whole one is as wanted."""

    def __init__(self, name: str, wanted: float) -> None:
        self.name, self.wanted = name, wanted
        self.inner = max(40.0, 0.8 * wanted)
        self._slope = 1.0
        self._before: tuple[float, float] | None = None

    def learn(self, got: float) -> None:
        """Move to what gives the wanted size, by how much the last move has changed it."""
        at = self.inner
        if self._before is not None and at != self._before[0]:
            moved = (got - self._before[1]) / (at - self._before[0])
            self._slope = min(8.0, max(0.5, moved))
        self._before = (at, got)
        self.inner = at + (self.wanted - got) / self._slope
        if self.inner < LEAST_INNER:
            raise ConfigError(
                f"{self.name}: expected room for the plot beside its axes and labels, at least "
                f"about {got - at + 2 * LEAST_INNER:.0f}, got {self.wanted:g}"
            )


def in_look(chart: Any, look: Look) -> Any:
    """The chart with the configuration of a look."""
    if not look.config:
        return chart
    chart = chart.copy(deep=False)
    chart.config = alt.Config(**look.config)
    return chart
