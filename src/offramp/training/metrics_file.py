"""The figures of a run by step, in a CSV file."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from offramp.errors import CheckpointError
from offramp.files import replacing
from offramp.reading import read_bytes

CSV_BYTES = 1 << 30
"""Largest metrics file that is read."""


class MetricsFile:
    """A CSV file with one row per step, which is written during the run.

    A resumed run continues the file and replaces the rows of steps that it repeats. A column is
    added with its first value; a cell without a value is empty. A row is on disk as soon as it is
    written; later values of its step replace it.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        self.path = path
        self._row: dict[str, Any] = {}  # of the latest step
        self._end = 0  # size of the file before that row
        rows = [row for row in read_metrics(path) if int(row["step"]) < first_step]
        self._names = list(dict.fromkeys(name for row in rows for name in row)) or ["step"]
        self._rewrite(rows)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write a step's row, or add values to it; a CheckpointError if that fails."""
        again = bool(self._row) and self._row["step"] == step
        self._row = {**(self._row if again else {}), "step": step, **values}
        new = [name for name in self._row if name not in self._names]
        try:
            if again:
                os.truncate(self.path, self._end)
            if new:
                self._names += new
                self._rewrite(read_metrics(self.path))
            self._end = self.path.stat().st_size
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._names, lineterminator="\n").writerow(self._row)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written: {error.strerror}") from None

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with replacing(self.path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a metrics file; none if there is no file.

    Raises CheckpointError for another file.
    """
    rows = read_rows(path) if path.exists() else []
    if not all(row.get("step", "").isdecimal() for row in rows):
        raise CheckpointError(f"{path}: expected a CSV file with a column step")
    return rows


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a CSV file, by column. Raises CheckpointError for another."""
    data = read_bytes(path, at_most=CSV_BYTES)
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")))
    except (UnicodeError, csv.Error) as error:
        raise CheckpointError(f"{path}: expected a readable CSV file, got {error}") from None
    return [row for row in rows if None not in row and None not in row.values()]
