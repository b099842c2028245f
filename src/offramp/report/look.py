"""How charts look: the themes of ``offramp plot``, and the styles that tell series apart."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import altair as alt

from offramp.errors import ConfigError

Theme = Literal["screen", "paper"]
THEMES: tuple[Theme, ...] = get_args(Theme)
COLUMN = 252.0
"""Width of a picture of theme paper, in points: a column of 3.5 inches."""
LEAST, MOST = 150.0, 4000.0
"""Least and largest width and height of a picture."""

DASHES = ([1, 0], [6, 3], [2, 2], [9, 3, 2, 3], [12, 4])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left")
STATIC_DASHES = ([4, 4], [1, 3], [8, 2, 1, 2])
"""Lines of static models, which are grey."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a series is drawn: two of up to 35 differ in dash or shape, even without colour."""

    colour: str
    dash: Sequence[int]
    shape: str


@dataclass(frozen=True, kw_only=True)
class Look:
    """A theme, and the size of a plot."""

    theme: Theme = "screen"
    palette: tuple[str, ...]
    "Colours of series, one after the other; a colour-blind reader can tell them apart."
    ordered: tuple[str, ...]
    "Colours from the least to the largest value of ordered series."
    other: str
    "The colour of a series that is not one of the ordered ones."
    grey: str
    "The colour of what is beside the series, such as static models."
    font_size: float
    "Size of labels in the plot, in pixels."
    line: float
    "Width of the lines of series."
    point: float
    "Area of the marks of series."
    scale: float = 1.0
    "Size of everything that has a size of its own, relative to theme screen."
    columns: int = 2
    "Number of plots beside each other."
    legend: Literal["right", "bottom"] = "right"
    config: Mapping[str, Any] = field(default_factory=dict)
    "Vega-Lite's configuration."
    pixels: float = 2.0
    "Pixels of a PNG for each unit of length."
    width: float | None = None
    "Width of one plot without its axes; None for the chart's own."
    height: float | None = None

    def size(self, width: float, height: float) -> tuple[float, float]:
        """The size of a plot that has this size of its own."""
        if self.width is None and self.height is None:
            return width * self.scale, height * self.scale
        wide = self.width or width * self.scale
        return wide, self.height or height * wide / width

    def sized(self, width: float | None, height: float | None) -> "Look":
        """The same look for plots of this size."""
        return replace(self, width=width, height=height)

    def title(self, title: str, subtitle: str = "", *, width: float) -> alt.Title:
        """A title in lines that fit into a width."""
        letter = 0.6 * (self.config.get("title", {}).get("fontSize") or 13)
        lines = textwrap.wrap(title, max(20, int(width / letter))) or [""]
        below = textwrap.wrap(subtitle, max(20, int(1.1 * width / letter)))
        return alt.Title(lines, subtitle=below) if below else alt.Title(lines)

    def legend_of(self, names: Sequence[str], **more: Any) -> alt.Legend:
        """A legend at its place, in as many columns as the width has room for."""
        letters = max(map(len, names), default=1)
        room = (self.width or 400) / (0.62 * self.font_size * min(letters, 40) + 24)
        wide: dict[str, Any] = {"columns": max(1, int(room))} if self.legend == "bottom" else {}
        limit = 360 * self.scale
        return alt.Legend(orient=self.legend, labelLimit=limit, **wide, **more)


def styles(
    names: Sequence[str], look: Look, colours: Sequence[str] | None = None
) -> dict[str, Style]:
    """Return a style for each series; ``colours`` takes the place of the theme's."""
    chosen = colours or [look.palette[i % len(look.palette)] for i in range(len(names))]
    return {
        name: Style(colour=colour, dash=DASHES[i % len(DASHES)], shape=SHAPES[i % len(SHAPES)])
        for i, (name, colour) in enumerate(zip(names, chosen, strict=True))
    }


def look_of(theme: str) -> Look:
    """The look of a theme. Raises ConfigError for a name that is no theme."""
    if theme not in _LOOKS:
        raise ConfigError(f"theme: expected {' or '.join(THEMES)}, got {theme!r}")
    return _LOOKS[theme]


def check_size(name: str, value: object) -> None:
    """Raise ConfigError unless a width or height is a number in the range of pictures."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not LEAST <= value <= MOST:  # type: ignore[operator]
        raise ConfigError(f"{name}: expected a number from {LEAST:g} to {MOST:g}, got {value!r}")


# Near Okabe and Ito's colours, but all eight are far apart for colour-blind readers, too, and are
# read on white and on black
SCREEN = Look(
    palette=(
        *("#216ce0", "#e07b00", "#09a173", "#c16a9f"),
        *("#ed5f73", "#7f8bdc", "#8f634c", "#b47d33"),
    ),
    ordered=("#8b6fd1", "#4f7fd0", "#2a97b5", "#22a37f", "#7aa02c", "#cb8600"),
    other="#a0527a",
    grey="#808080",
    font_size=11,
    line=2,
    point=36,
)
_FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"
_INK, _RULE = "#000000", "#dddddd"
PAPER = Look(
    theme="paper",
    palette=(
        *("#000000", "#0269c2", "#b24d08", "#01a46e"),
        *("#733186", "#b48d02", "#5794cf", "#d5645f"),
    ),
    ordered=("#440154", "#433e85", "#2c6f8e", "#1f8580", "#2c9653", "#8d981a"),
    other="#b03060",
    grey="#666666",
    font_size=7,
    line=0.9,
    point=10,
    scale=0.55,
    columns=1,
    legend="bottom",
    pixels=300 / 72,
    config={
        "background": "transparent",
        "font": _FONT,
        "padding": 2,
        "view": {"stroke": None},
        "axis": {
            "labelFontSize": 7,
            "titleFontSize": 8,
            "titleFontWeight": "normal",
            "labelColor": _INK,
            "titleColor": _INK,
            "titlePadding": 3,
            "labelPadding": 2,
            "tickSize": 3,
            "tickWidth": 0.5,
            "tickColor": _INK,
            "domainWidth": 0.5,
            "domainColor": _INK,
            "gridWidth": 0.3,
            "gridColor": _RULE,
        },
        "legend": {
            "labelFontSize": 7,
            "titleFontSize": 7,
            "labelColor": _INK,
            "titleColor": _INK,
            "symbolSize": 24,
            "rowPadding": 1,
            "columnPadding": 6,
            "offset": 4,
        },
        "title": {
            "fontSize": 8,
            "fontWeight": "normal",
            "subtitleFontSize": 7,
            "color": _INK,
            "subtitleColor": _INK,
            "offset": 4,
        },
        "text": {"fontSize": 7},
        "concat": {"spacing": 8},
    },
)
_LOOKS: Mapping[str, Look] = {"screen": SCREEN, "paper": PAPER}
