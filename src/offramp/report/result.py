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

    def plot(self) -> Any:
        """Return an Altair chart of the result; notebooks show it, ``.save(path)`` writes it."""
        from offramp.report.charts import chart_of

        return chart_of(self.content)

    def save(self, path: str | Path) -> None:
        """Write the result: ``.json`` holds all of it, ``.csv`` the rows."""
        path = Path(path)
        if path.suffix == ".csv":
            write_csv(path, [asdict(row) for row in self.rows])  # type: ignore[call-overload]
        elif path.suffix == ".json":
            write_json(path, self.content)
        else:
            raise ConfigError(f"path: expected a name that ends in .json or .csv, got {path}")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write flat columns: a mapping in a row becomes a column for each of its keys."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    with replacing(path) as aside:
        aside.write_text(text.getvalue(), encoding="utf-8")


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


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}_{key}": part for key, part in value.items()}
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
