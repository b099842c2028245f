"""Names and texts in messages, tables, bars, pages and plots: no control character is obeyed."""

import io

import pytest
from rich.table import Table as RichTable

from offramp.console import safe_console
from offramp.printable import printable
from offramp.report.drawing import data_chart, spec_of
from offramp.report.fit import fit_table
from offramp.report.html import page_environment
from offramp.report.progress import bars
from offramp.report.tables import Column, Table, markdown_table, terminal_table

HOSTILE = "a\x1b]0;title\x07\x9b2J\u202eb\x00\x7f\u2028\ud800"
SHOWN = r"a\x1b]0;title\x07\x9b2J\u202eb\x00\x7f\u2028\ud800"


@pytest.mark.parametrize(
    "text", ["", "plain", "na\u00efve \U0001f468\u200d\U0001f469", "\u4e2d\u6587", "a\\x1b"]
)
def test_other_text_stays_as_it_is(text):
    assert printable(text) == text


def test_control_direction_and_invisible_characters_are_escapes():
    assert printable(HOSTILE) == SHOWN
    assert printable("a\n\tb\r\f") == r"a\n\tb\r\x0c"
    assert printable("a\n\tb\r\f", lines=True) == "a\n\tb" + r"\r\x0c"
    assert printable("zero\u200bwidth\ufeff\U000e0041") == r"zero\u200bwidth\ufeff\U000e0041"


def seen(draw, **options):
    file = io.StringIO()
    console = safe_console(file=file, width=200, **options)
    draw(console)
    return file.getvalue()


def unsafe(text):
    return [character for character in text if printable(character, lines=True) != character]


def test_a_console_prints_no_control_character():
    assert seen(lambda console: console.print(HOSTILE, markup=False)).count(r"\x1b]0;title") == 1
    assert not unsafe(seen(lambda console: console.print("x", HOSTILE, sep=HOSTILE)))


def test_tables_show_names_as_they_are_and_no_markup():
    def rich_table(console):
        table = RichTable(title=HOSTILE, caption="[red]x")
        table.add_column(f"[bold]{HOSTILE}")
        table.add_row(f"[link=x]{HOSTILE}")
        console.print(fit_table(table, 200))

    text = seen(rich_table)
    assert not unsafe(text)
    assert text.count(r"\x1b]0;title") == 3
    assert "[bold]a" in text
    assert "[link=x]a" in text
    assert "[red]x" in text

    value = Table(
        title=HOSTILE,
        header=(Column(title=HOSTILE, short=HOSTILE),),
        rows=((HOSTILE,),),
        notes=(HOSTILE,),
    )
    assert not unsafe(seen(lambda console: console.print(terminal_table(HOSTILE, value, 200))))
    assert not unsafe("\n".join(markdown_table(value, 2)))


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_show_names_as_they_are(terminal, monkeypatch):
    monkeypatch.setattr("offramp.report.progress.LINE_EVERY", 0.0)

    def draw(console):
        with bars(console) as drawn:
            drawn.show(HOSTILE, done=1, total=2, text=f"[red]{HOSTILE}")
            drawn.show(HOSTILE, done=2, total=2, text=HOSTILE)

    text = seen(draw, force_terminal=terminal, color_system=None)
    assert r"\x1b]0;title" in text
    assert "\x1b]" not in text
    assert not set("\x07\x9b\u202e\x00\x7f") & set(text)


def test_pages_and_plots_hold_no_control_character():
    environment, _ = page_environment()
    assert environment.from_string("<b>{{ name }}</b>").render(name=f"<i>{HOSTILE}") == (
        f"<b>&lt;i&gt;{SHOWN}</b>"
    )
    chart = data_chart([{"of": HOSTILE, "x": 1.0}]).mark_point().properties(title=HOSTILE)
    assert not unsafe(str(spec_of(chart)))
    assert r"\x1b]0;title" in str(spec_of(chart)).replace(r"\\", "\\")
