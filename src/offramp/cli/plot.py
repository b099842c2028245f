"""offramp plot."""

from pathlib import Path
from shlex import quote

from offramp.cli.base import check_out_file, say
from offramp.cli.interrupts import work_begins
from offramp.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")


def plot(file: Path, *, out: Path | None = None) -> None:
    """Draw a result file: of sweep, confidence, calibrate, probe, bench, train, study or reproduce.

    Parameters
    ----------
    file
        The JSON file that a command wrote (with --out), study.json, results.json, or the
        metrics.csv of a training run.
    out
        The picture: PNG, SVG or PDF, by the name's ending (default: FILE with the ending .png).
    """
    if not file.name:
        raise ConfigError(f"file: expected a result file, got {file}")
    out = out or file.with_suffix(".png")
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"out: expected a name that ends in .png, .svg or .pdf, got {out}")
    check_out_file(out)
    if not file.is_file():
        raise ConfigError(f"{file}: expected a result file, found none")

    from offramp.report.charts import chart_of, read_result, save_chart

    work_begins()
    save_chart(chart_of(read_result(file)), out)
    say(f"Picture written: {quote(str(out))}")
