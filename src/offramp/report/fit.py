"""Fits a terminal table to a width: it drops whole columns and never cuts a cell."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from offramp.printable import printable

_WIDE = 10_000


def fit_table(table: Table, width: int, *, least_important: Sequence[str] = ()) -> Table:
    """The table without the columns for which ``width`` characters have no room.

    Columns are dropped in the order of ``least_important`` (their headers, the first one first)
    until each cell fits on one line. The caption then names them. If all of these are dropped and
    the table is still too wide, long cells continue on the next line: no character is left out.
    """
    dropped: list[str] = []
    table = fitted = literal_table(table)
    for header in least_important:
        if natural_width(fitted) <= width:
            break
        if any(column.header == header for column in fitted.columns):
            dropped.append(header)
            fitted = _without(table, dropped)
    shown = copy(fitted)
    whole = natural_width(fitted) <= width
    shown.columns = [replace(column, no_wrap=whole, overflow="fold") for column in fitted.columns]
    if dropped:
        names = ", ".join(column.header for column in table.columns if column.header in dropped)
        hidden = f"not shown for lack of width: {names}"
        shown.caption = f"{table.caption}; {hidden}" if table.caption else hidden
    return shown


def literal_table(table: Table) -> Table:
    """The table whose strings are shown as they stand: neither as markup nor to be obeyed."""
    shown = copy(table)
    shown.columns = [
        replace(
            column,
            header=_literal(column.header),
            _cells=[_literal(cell) for cell in column.cells],
        )
        for column in table.columns
    ]
    shown.title, shown.caption = _literal(table.title), _literal(table.caption)
    return shown


def _literal(part: Any) -> Any:
    return escape(printable(part, lines=True)) if isinstance(part, str) else part


def natural_width(table: Table) -> int:
    """The characters that the table needs so that every cell is on one line."""
    console = Console(width=_WIDE, legacy_windows=False)
    plain = copy(table)
    plain.columns = [replace(column, no_wrap=True) for column in table.columns]
    return console.measure(plain).maximum


def _without(table: Table, dropped: Sequence[str]) -> Table:
    left = copy(table)
    kept = [column for column in table.columns if column.header not in dropped]
    left.columns = [replace(column, _index=index) for index, column in enumerate(kept)]
    return left
