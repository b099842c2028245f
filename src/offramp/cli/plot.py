"""offramp plot."""

from pathlib import Path
from shlex import quote
from typing import Literal

from offramp.cli.base import check_out_file, say
from offramp.cli.interrupts import work_begins
from offramp.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")


def plot(
    file: Path,
    *,
    out: Path | None = None,
    theme: Literal["screen", "paper"] = "screen",
    width: float | None = None,
    height: float | None = None,
) -> None:
    """Draw a result file: of sweep, confidence, calibrate, probe, bench, train, study or reproduce.

    Parameters
    ----------
    file
        The JSON file that a command wrote (with --out), study.json, results.json, or the
        metrics.csv of a training run.
    out
        The picture: PNG, SVG or PDF, by the name's ending (default: FILE with the ending .png).
    theme
        screen, or paper: no background, thin lines, a small plain font and dark colours.
    width
        Width of the whole picture, in units of which a PNG has 2 pixels (paper: of 1/72 inch, at
        300 pixels an inch) (default: as the chart needs; paper: 252, a column of 3.5 inches).
    height
        Height of the whole picture, in the same units (default: as the chart needs).
    """
    if not file.name:
        raise ConfigError(f"file: expected a result file, got {file}")
    out = out or file.with_suffix(".png")
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"out: expected a name that ends in .png, .svg or .pdf, got {out}")
    check_out_file(out)
    if not file.is_file():
        raise ConfigError(f"{file}: expected a result file, found none")

    from offramp.report.charts import chart_of, read_result
    from offramp.report.drawing import save_chart
    from offramp.report.look import look_of

    work_begins()
    chart = chart_of(read_result(file), theme=theme, width=width, height=height)
    save_chart(chart, out, look_of(theme).pixels)
    say(f"Picture written: {quote(str(out))}")
