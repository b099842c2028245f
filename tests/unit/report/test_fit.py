import io

import pytest
from rich.console import Console
from rich.table import Table

from offramp.report.fit import fit_table, natural_width

HEADERS = ("method", "tokens/s", "range", "vs full")
CELLS = (("exit@0.345:propagate", "101.5", "99.2 to 104.1", "1.31"), ("full", "77.1", "70", "1"))


def make(caption=None):
    table = Table(caption=caption)
    for header in HEADERS:
        table.add_column(header)
    for row in CELLS:
        table.add_row(*row)
    return table


def drawn(table, width):
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()


def headers(table):
    return [column.header for column in table.columns]


def test_a_table_that_fits_is_shown_whole():
    table = make()
    fitted = fit_table(table, natural_width(table), least_important=("range", "tokens/s"))
    assert headers(fitted) == list(HEADERS)
    text = drawn(fitted, natural_width(table))
    assert all(cell in text for row in CELLS for cell in row)
    assert "not shown" not in text
    assert text.count("\n") == len(CELLS) + 4  # a line each: no cell is folded


def test_the_least_important_columns_go_first_and_are_named():
    table = make("a caption")
    fitted = fit_table(table, natural_width(table) - 1, least_important=("range", "tokens/s"))
    assert headers(fitted) == ["method", "tokens/s", "vs full"]
    assert fitted.caption == "a caption; not shown for lack of width: range"
    fitted = fit_table(table, 34, least_important=("range", "tokens/s"))
    assert headers(fitted) == ["method", "vs full"]
    assert fitted.caption.endswith("not shown for lack of width: tokens/s, range")
    assert headers(table) == list(HEADERS)  # the table itself is left as it is


@pytest.mark.parametrize("width", [24, 34, 46, 60, 80])
def test_no_width_is_exceeded_and_no_letter_lost(width):
    fitted = fit_table(make(), width, least_important=("range", "tokens/s"))
    lines = drawn(fitted, width).splitlines()
    assert max(map(len, lines)) <= width
    joined = "".join(character for line in lines for character in line if character.isalnum())
    assert "…" not in "".join(lines)
    kept = [HEADERS.index(header) for header in headers(fitted)]
    expected = "".join(CELLS[0][column] for column in kept)
    for character in set(filter(str.isalnum, expected)):
        assert joined.count(character) >= expected.count(character)
