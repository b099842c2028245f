"""A chart of any result file: what ``offramp plot`` and a result's ``.plot()`` draw."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import altair as alt

from offramp.errors import ConfigError
from offramp.reading import read_json
from offramp.report.command_charts import (
    bench_chart,
    certificate_chart,
    check_chart,
    metrics_chart,
    probe_chart,
    sweep_chart,
)
from offramp.report.confidence import confidence_plot
from offramp.report.drawing import fitted, in_look
from offramp.report.evaluation_chart import evaluation_chart
from offramp.report.look import COLUMN, Look, check_size, look_of
from offramp.report.plots import frontier
from offramp.report.scale_plot import ratios
from offramp.report.scale_result import ScaleResult
from offramp.report.study_plots import frontiers
from offramp.report.study_result import StudyResult
from offramp.schema import fitting, place_of_infinity
from offramp.training.metrics_file import read_metrics, read_rows
from offramp.version import __version__

Content = Mapping[str, Any]
_DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)


def read_result(path: Path) -> Content:
    """The content of a result file: JSON, or the ``metrics.csv`` of a training run."""
    if path.suffix.lower() == ".csv":
        return _csv(path)
    content = read_json(path)
    if place := place_of_infinity(content):
        raise ConfigError(f"{path}: expected finite numbers, got another at {place}")
    return content if isinstance(content, Mapping) else {}


def _csv(path: Path) -> Content:
    """The metrics.csv of a training run, or the table of a sweep."""
    rows = read_rows(path)
    if not rows:
        raise ConfigError(f"{path}: expected a CSV file with rows, got none")
    if "threshold" not in rows[0]:
        return {"metrics": read_metrics(path)}
    costs = ("ppl", "compute_pct", "flops_pct")
    try:
        numbers = [{key: float(row[key]) for key in costs if row.get(key)} for row in rows]
    except ValueError as error:
        raise ConfigError(f"{path}: expected numbers under {', '.join(costs)}: {error}") from None
    return {"rows": [{**row, **found} for row, found in zip(rows, numbers, strict=True)]}


def chart_of(
    content: Content,
    *,
    theme: str = "screen",
    width: float | None = None,
    height: float | None = None,
) -> Any:
    """The Altair chart of a result file's content.

    Parameters
    ----------
    theme
        ``screen``, or ``paper``: no background, thin lines and dark colours, as wide as a column.
    width, height
        The size of the whole picture, in pixels of 1/72 inch; None for the theme's.

    Raises
    ------
    ConfigError
        If the content is no result, or the theme or a size is none.
    """
    look = look_of(theme)
    for name, asked in (("width", width), ("height", height)):
        if asked is not None:
            check_size(name, asked)
    if width is None and look.theme == "paper":
        width = COLUMN
    draw = next((draw for key, draw in _KINDS.items() if key in content), None)
    if draw is None:
        raise ConfigError(
            "file: expected a result of offramp sweep, confidence, calibrate, probe, bench, "
            "evaluate, train (metrics.csv), study, recipe or reproduce, got something else"
        )

    def drawn(sized: Look) -> Any:
        return in_look(draw(content, sized), sized)

    try:
        if width is None and height is None:
            chart = drawn(look)
            chart.to_dict()
            return chart
        return fitted(drawn, look, width, height)
    except ConfigError:
        raise
    except _DAMAGED as error:
        raise ConfigError(
            f"file: expected a whole result file, got one that cannot be drawn: {error!r}"
        ) from None


def _reproduction(content: Content, look: Look) -> Any:
    corpora = enumerate(content["corpora"].values())
    return alt.vconcat(*(frontier(each, look=look, place=place) for place, each in corpora))


def _study(content: Content, look: Look) -> Any:
    """PPL against FLOPs%, by the study's first measure: a curve a recipe, and static models."""
    try:
        result = fitting(StudyResult, content)
    except ConfigError as error:
        writer = content.get("offramp_version")
        by = f" (offramp {writer} wrote it)" if isinstance(writer, str) else ""
        raise ConfigError(
            f"study: expected what offramp {__version__} writes{by}, got one that differs: {error}"
        ) from None
    return frontiers(result, *result.families[0], look=look)


def _scale(content: Content, look: Look) -> Any:
    """Ratio of PPLs against the number of parameters."""
    try:
        result = fitting(ScaleResult, content)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return ratios(result, look)


_KINDS: dict[str, Callable[[Content, Look], Any]] = {
    "evaluations": evaluation_chart,
    "measures": confidence_plot,
    "bandwidth_gb_s": bench_chart,
    "oracle_layers": probe_chart,
    "p_values": certificate_chart,
    "p_broken": check_chart,
    "metrics": metrics_chart,
    "sizes": _scale,
    "study": _study,
    "corpora": _reproduction,
    "rows": sweep_chart,
}
"""The kinds of content, by a key that only they have; the first that fits."""
