"""The figures of a run by step, in a CSV file."""

import csv
from pathlib import Path
from typing import Any

from offramp.errors import CheckpointError
from offramp.files import replacing


class MetricsFile:
    """A CSV file with one row per step, which is written during the run.

    A resumed run continues the file and replaces the rows of steps that it repeats. A column is
    added with its first value; a cell without a value is empty.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        self.path = path
        self._row: dict[str, Any] = {}  # of the latest step, not written yet
        rows = [row for row in read_metrics(path) if int(row["step"]) < first_step]
        self._names = list(dict.fromkeys(name for row in rows for name in row)) or ["step"]
        self._rewrite(rows)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add values to the row of a step."""
        if self._row and self._row["step"] != step:
            self.flush()
        self._row |= {"step": step, **values}

    def flush(self) -> None:
        """Write the row of the latest step."""
        if not self._row:
            return
        new = [name for name in self._row if name not in self._names]
        if new:
            self._names += new
            self._rewrite(read_metrics(self.path))
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._names, lineterminator="\n").writerow(self._row)
        self._row = {}

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with replacing(self.path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a metrics file; an empty list if there is no file.

    Raises CheckpointError if the file is not a metrics file.
    """
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeError, csv.Error) as error:
        raise CheckpointError(f"{path}: expected a readable CSV file, got {error}") from None
    whole = [row for row in rows if None not in row and None not in row.values()]
    if not all(row.get("step", "").isdecimal() for row in whole):
        raise CheckpointError(f"{path}: expected a CSV file with a column step")
    return whole
