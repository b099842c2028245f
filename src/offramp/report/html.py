"""The report of a reproduction as one self-contained HTML page."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup

from offramp.files import replacing
from offramp.printable import printable
from offramp.report import plots
from offramp.report.drawing import spec_of, vegalite_version
from offramp.report.look import SCREEN
from offramp.report.reproduction_tables import (
    environment_table,
    exit_table,
    explanations_table,
    findings_table,
    grid_table,
    power_table,
    protocol_table,
    seed_tables,
)
from offramp.report.tables import VERDICT_STYLES, Table
from offramp.report.text import SEED_CITATION, Corpus, Results, count_verdicts, headline

# the visible sign that is shown with a white-space character
WHITE_SPACE = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}
SHALLOW_HUE, DEEP_HUE = 205.0, 35.0  # blue to orange: distinct for colour-blind readers, too
WIDTHS = (760.0, 290.0)
"""Widths of a plot whose labels have places: on a wide page, and on one of 400 pixels."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart on the page: its caption and its Vega-Lite specification without them."""

    title: str
    caption: str
    spec: Mapping[str, Any]
    narrow: Mapping[str, Any] | None = None
    "The specification for a narrow page, where labels have places of their own there."


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of a passage: its text, the exit that it took, and its tooltip."""

    text: str
    exit_layer: int
    mark: str
    tooltip: str


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A passage of validation text, and how many of its tokens took which exit."""

    title: str
    tokens: tuple[Token, ...]
    exits: Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class Section:
    """The page's content for one corpus, in the page's order."""

    name: str
    anchor: str
    headline: str
    verdicts: Mapping[str, int]
    findings: Table
    grid: Table
    power: Table
    frontiers: tuple[Figure, ...]
    tables: tuple[Table, ...]
    thresholds: tuple[Figure, ...]
    seeds: Figure
    exits: Figure
    exit_table: Table
    explanations: Table
    passages: tuple[Passage, ...]
    notes: tuple[str, ...]
    protocol: Table


def write_report(results: Results, path: Path) -> None:
    """Write the report to `path`, whole or not at all; it needs no other file and no network."""
    page = render(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_text(page, encoding="utf-8", newline="\n")


def render(results: Results) -> str:
    """The report's HTML."""
    environment, vega = page_environment()
    sections = [
        make_section(name, f"corpus-{number}", corpus)
        for number, (name, corpus) in enumerate(results["corpora"].items(), start=1)
    ]
    layers = {layer for section in sections for one in section.passages for layer in one.exits}
    depth = max(layers, default=1)
    return environment.get_template("report.html.jinja").render(
        sections=sections,
        environment=environment_table(results),
        verdict_styles=VERDICT_STYLES,
        exit_hues={layer: exit_hue(layer, depth) for layer in sorted(layers)},
        citation=SEED_CITATION,
        vega=vega,
        version=results["offramp_version"],
    )


def page_environment() -> tuple[jinja2.Environment, Markup]:
    """The environment that renders the templates, and the script that draws their charts."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("offramp.report", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment, javascript()


def _shown(value: Any) -> Any:
    """A value of the page, in which no control character changes how the page is read."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, lines=True)
    return value


@functools.cache
def javascript() -> Markup:
    """Vega, Vega-Lite and Vega-Embed as one script that fits inside a script element."""
    bundle = vl_convert.javascript_bundle(
        "window.vegaEmbed = vegaEmbed;", vl_version=vegalite_version()
    )
    # a string literal may hold either; a script element ends or changes its meaning there
    bundle = bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return Markup(bundle)


def make_section(name: str, anchor: str, corpus: Corpus) -> Section:
    """Gather the page's parts for one corpus."""
    present = {curve["epoch"] for curve in corpus["curves"]}
    epochs = [epoch for epoch in ("best", "last") if epoch in present] or ["best"]
    return Section(
        name=name,
        anchor=anchor,
        headline=headline(name, corpus),
        verdicts=count_verdicts(corpus),
        findings=findings_table(corpus),
        grid=grid_table(corpus),
        power=power_table(corpus),
        frontiers=tuple(make_figure(plots.frontier(corpus, epoch=epoch)) for epoch in epochs),
        tables=tuple(seed_tables(corpus)),
        thresholds=tuple(
            make_figure(plots.threshold_curves(corpus, epoch=epoch)) for epoch in epochs
        ),
        seeds=make_figure(plots.seed_spread(corpus)),
        exits=make_figure(plots.exit_ppl(corpus)),
        exit_table=exit_table(corpus),
        explanations=explanations_table(corpus),
        passages=tuple(make_passage(passage) for passage in corpus["passages"]),
        notes=tuple(corpus["notes"]),
        protocol=protocol_table(corpus),
    )


def make_figure(chart: alt.LayerChart | alt.VConcatChart) -> Figure:
    """A chart without its title and description, which the page shows as text."""
    spec = spec_of(chart)
    return Figure(title=_title(spec), caption=spec["description"], spec=spec)


def labelled_figure(
    draw: Callable[..., alt.LayerChart], *, heights: tuple[float, float] = (420, 330)
) -> Figure:
    """A chart whose labels are placed for a wide page and for a narrow one.

    The page shows it in one of these two sizes, scaled, so that no label moves onto a curve.
    """
    looks = (SCREEN, replace(SCREEN, legend="bottom"))
    sizes = zip(looks, WIDTHS, heights, strict=True)
    specs = [spec_of(draw(look=look.sized(width, height))) for look, width, height in sizes]
    wide, narrow = specs
    title = _title(wide)
    _title(narrow)
    return Figure(title=title, caption=wide["description"], spec=wide, narrow=narrow)


def _title(spec: dict[str, Any]) -> str:
    """Take the title out of a specification."""
    title = spec.pop("title")
    text = title["text"] if isinstance(title, Mapping) else title
    return text if isinstance(text, str) else " ".join(text)


def make_passage(passage: Mapping[str, Any]) -> Passage:
    """A passage of validation text, token by token."""
    exits = passage["exit_layer"]
    title = f"{passage['label']}, seed {passage['seed']}, threshold {passage['threshold']:g}"
    counts = {layer: exits.count(layer) for layer in sorted(set(exits))}
    return Passage(title=title, tokens=tuple(make_tokens(passage)), exits=counts)


def make_tokens(passage: Mapping[str, Any]) -> Iterator[Token]:
    """Each token with the exit it took and its confidence at the first exit."""
    columns = (passage["characters"], passage["exit_layer"], passage["confidence"])
    for text, exit_layer, confidence in zip(*columns, strict=True):
        yield Token(
            text=text,
            exit_layer=exit_layer,
            mark=WHITE_SPACE.get(text, ""),
            tooltip=f"exit layer {exit_layer}, confidence {confidence:.3f} at the first exit",
        )


def exit_hue(layer: int, depth: int) -> float:
    """The colour of an exit as a hue in degrees, from the shallowest layer to the deepest."""
    share = (layer - 1) / max(depth - 1, 1)
    return round(SHALLOW_HUE + share * (DEEP_HUE - SHALLOW_HUE), 1)
