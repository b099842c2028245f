"""A table as a value, and how it becomes Markdown or a table in a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import rich.box
import rich.console
import rich.table
from rich.cells import cell_len
from rich.text import Text

from offramp.printable import printable

VERDICT_STYLES = {
    "holds": "green",
    "yes": "green",
    "does not hold": "red",
    "no": "red",
    "undecided": "yellow",
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    title: str
    short: str | None = None
    "The title in a terminal; None: the column is not shown there."
    kind: Literal["text", "number", "verdict", "detail"] = "text"
    dropped: int | None = None
    "Place in the order in which a narrow terminal drops columns; None: never dropped."


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, a header, rows of strings with a cell a column, and sentences to print below."""

    title: str
    header: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it stands, also inside a table's cell."""
    for sign in "\\|<*`":
        text = text.replace(sign, f"\\{sign}")
    return printable(" ".join(text.split()))


def markdown_table(table: Table, level: int) -> list[str]:
    """The lines of one table below a heading of that level."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    right = ["---:" if column.kind == "number" else "---" for column in table.header]
    titles = [escape_markdown(column.title) for column in table.header]
    rows = [line([escape_markdown(cell) for cell in row]) for row in table.rows]
    notes = [f"- {escape_markdown(note)}" for note in table.notes]
    heading = f"{'#' * level} {escape_markdown(table.title)}"
    return [heading, "", line(titles), line(right), *rows, "", *notes, *([""] if notes else [])]


def terminal_table(name: str, table: Table, width: int) -> rich.table.Table:
    """A table in its short form for a terminal of that width; no cell is read as markup.

    Where there is no room, text continues on the next line. Where there is no room for its words,
    columns are dropped, and named below the table.
    """
    kept = [place for place, column in enumerate(table.header) if column.short is not None]
    droppable = [place for place in kept if table.header[place].dropped is not None]
    left_out: list[int] = []
    shown = _rich_table(name, table, kept, left_out)
    for place in sorted(droppable, key=lambda place: table.header[place].dropped or 0):
        if rich.console.Console(width=10_000).measure(shown).minimum <= width:
            break
        left_out.append(place)
        kept.remove(place)
        shown = _rich_table(name, table, kept, left_out)
    return shown


def _rich_table(
    name: str, table: Table, kept: Sequence[int], left_out: Sequence[int]
) -> rich.table.Table:
    """The table with the columns at the places ``kept``; those ``left_out`` are named below it."""
    titles = ", ".join(" ".join((table.header[at].short or "").split()) for at in sorted(left_out))
    notes = (*((f"Not shown for lack of width: {titles}.",) if titles else ()), *table.notes)
    shown = rich.table.Table(
        title=Text(printable(f"{name}: {table.title}"), style="bold"),
        caption=Text(printable("\n".join(notes), lines=True)),
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for place in kept:
        column = table.header[place]
        number = column.kind == "number"
        justify: Literal["left", "right"] = "right" if number else "left"
        title = column.short or ""
        cells = [*title.splitlines(), *(printable(row[place], lines=True) for row in table.rows)]
        shown.add_column(
            Text(printable(title, lines=True)),
            justify=justify,
            no_wrap=number,
            overflow="fold",
            min_width=max(map(cell_len, cells)) if number else None,
        )
    for row in table.rows:
        shown.add_row(*(_cell(row[place], table.header[place]) for place in kept))
    return shown


def _cell(text: str, column: Column) -> Text:
    style = VERDICT_STYLES.get(text, "") if column.kind == "verdict" else ""
    return Text(printable(text, lines=True), style=style)
