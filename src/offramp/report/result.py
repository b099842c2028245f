"""A result that a Python user holds: rows, a plot, and files."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from offramp.errors import ConfigError
from offramp.files import replacing, write_json

Row = TypeVar("Row")
_SHOWN = 20


@dataclass(frozen=True, kw_only=True, repr=False)
class ResultTable(Generic[Row]):
    """Rows of figures, and the content of the result file that they come from."""

    rows: list[Row]
    "One dataclass for each line of the table."
    content: Mapping[str, Any]
    "What the command writes as JSON: the rows, the text, the model."

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        lines = table_text(self.rows[:_SHOWN])
        more = len(self.rows) - _SHOWN
        return lines if more <= 0 else f"{lines}\n... {more} more rows"

    def plot(
        self, *, theme: str = "screen", width: float | None = None, height: float | None = None
    ) -> Any:
        """Return an Altair chart of the result; notebooks show it, ``.save(path)`` writes it.

        Parameters
        ----------
        theme
            ``screen``, or ``paper``: no background, thin lines, a small plain font and dark
            colours, as wide as a column.
        width, height
            Size of the whole picture in pixels, or in points of 1/72 inch in a PDF; None for the
            theme's.
        """
        from offramp.report.charts import chart_of

        return chart_of(self.content, theme=theme, width=width, height=height)

    def save(self, path: str | Path) -> None:
        """Write the result: ``.json`` holds all of it, ``.csv`` and ``.tex`` (LaTeX) the rows."""
        path = Path(path)
        if path.suffix == ".json":
            write_json(path, self.content)
            return
        if path.suffix not in (".csv", ".tex"):
            raise ConfigError(f"path: expected a name that ends in .json, .csv or .tex, got {path}")
        rows: list[dict[str, Any]] = [asdict(row) for row in self.rows]  # type: ignore[call-overload]
        if path.suffix == ".csv":
            write_csv(path, rows)
        else:
            write_latex(path, rows)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write flat columns: a mapping in a row becomes a column for each of its keys."""
    flat, names = _columns(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    with replacing(path) as aside:
        aside.write_text(text.getvalue(), encoding="utf-8")


def write_latex(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the same columns as a ``tabular`` of LaTeX, with numbers of four digits."""
    flat, names = _columns(rows)
    lines = [names, *([_short(row.get(name)) for name in names] for row in flat)]
    body = [" & ".join(map(_escaped, line)) + r" \\" for line in lines]
    text = [rf"\begin{{tabular}}{{{'r' * len(names)}}}", r"\hline", body[0], r"\hline", *body[1:]]
    with replacing(path) as aside:
        aside.write_text("\n".join([*text, r"\hline", r"\end{tabular}", ""]), encoding="utf-8")


def table_text(rows: Sequence[Any]) -> str:
    """Dataclasses as lines of aligned columns."""
    if not rows:
        return "(no rows)"
    names = [field.name for field in fields(rows[0])]
    cells = [names, *([_short(getattr(row, name)) for name in names] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(names))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows without mappings in them, and the names of all their columns."""
    flat = [_flat(row) for row in rows]
    return flat, list(dict.fromkeys(name for row in flat for name in row))


def _escaped(text: str) -> str:
    """Return text in which LaTeX reads no character as a command."""
    return "".join(_LATEX.get(character, character) for character in text)


_LATEX = {character: rf"\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}_{key}": part for key, part in _flat(value).items()}
        elif isinstance(value, list | tuple):
            found[name] = ":".join(map(str, value))
        else:
            found[name] = value
    return found


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{_short(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ":".join(_short(part) for part in value)
    return str(value)
