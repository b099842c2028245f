"""The tables of a reproduction: built once, rendered as Markdown and for a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import rich.box
import rich.table
from rich.text import Text

from offramp.report.text import (
    Corpus,
    Results,
    headline,
    number_text,
    outside_notes,
    p_text,
    stat_text,
    value_text,
    weights_text,
)

SEED_TABLES = {
    "exp5_results": "Experiment 5: results",
    "exp5_thresholds": "Experiment 5: thresholds",
    "exp6_results": "Experiment 6: results",
    "exp6_thresholds": "Experiment 6: thresholds",
    "baselines": "Baselines",
}
VERDICT_STYLES = {
    "holds": "green",
    "yes": "green",
    "does not hold": "red",
    "no": "red",
    "undecided": "yellow",
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its title, its title in a terminal (None: left out there) and what it holds."""

    title: str
    short: str | None = None
    kind: Literal["text", "number", "verdict", "detail"] = "text"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, a header, rows of strings (one cell a column) and sentences to print below."""

    title: str
    header: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def seed_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One of the document's tables: published beside measured, and every seed's value."""
    header = (
        Column(title="Method", short="Method"),
        Column(title="Epoch", short="Epoch"),
        Column(title="Threshold", short="Thr.", kind="number"),
        Column(title="PPL, published", short="PPL\npubl.", kind="number"),
        Column(title="PPL, measured", short="PPL\nmeasured", kind="number"),
        Column(title="Distance (std)", kind="number"),
        Column(title="Shallow%, published", short="Sh%\npubl.", kind="number"),
        Column(title="Shallow%, measured", short="Sh%\nmeasured", kind="number"),
        Column(title="Compute%, published", short="C%\npubl.", kind="number"),
        Column(title="Compute%, measured", short="C%\nmeasured", kind="number"),
        Column(title="Loss weights", kind="detail"),
        Column(title="PPL by seed", kind="detail"),
        Column(title="Shallow% by seed", kind="detail"),
    )
    cells = []
    for row in rows:
        published, measured = row["published"] or {}, row["measured"]
        cells.append(
            (
                row["label"],
                row["epoch"],
                number_text(row["threshold"], 2),
                number_text(published.get("ppl"), 2),
                stat_text(measured["ppl"], 2),
                number_text(row["distance_in_std"], 2, sign=True),
                number_text(published.get("shallow_pct"), 1),
                stat_text(measured["shallow_pct"], 1),
                number_text(published.get("compute_pct"), 1),
                stat_text(measured["compute_pct"], 1),
                weights_text(row["loss_weights"]),
                ", ".join(number_text(value, 2) for value in measured["ppl"]["values"]),
                ", ".join(number_text(value, 1) for value in measured["shallow_pct"]["values"]),
            )
        )
    modes = ", ".join(sorted({row["missing_kv"] for row in rows}))
    meaning = (
        "Measured: mean ± sample standard deviation over the seeds. Distance: published less "
        f"measured PPL, in those deviations. missing_kv: {modes}."
    )
    return Table(
        title=title, header=header, rows=tuple(cells), notes=(meaning, *outside_notes(rows))
    )


def seed_tables(corpus: Corpus) -> list[Table]:
    """The document's tables that this corpus has rows for, in the document's order."""
    return [
        seed_table(title, corpus["tables"][key])
        for key, title in SEED_TABLES.items()
        if corpus["tables"].get(key)
    ]


def findings_table(corpus: Corpus) -> Table:
    """The document's findings, what was measured of each, and the verdict."""
    header = (
        Column(title="#", short="#", kind="number"),
        Column(title="Claim", short="Claim"),
        Column(title="Verdict", short="Verdict", kind="verdict"),
        Column(title="Published", short="Published"),
        Column(title="Measured", short="Measured"),
        Column(title="Effect, %", kind="number"),
        Column(title="p (Holm)", short="p (Holm)", kind="number"),
        Column(title="p (uncorrected)", kind="number"),
        Column(title="Seeds", kind="number"),
        Column(title="Test", kind="detail"),
    )
    rows = tuple(
        (
            str(finding["id"]),
            finding["claim"],
            finding["verdict"],
            finding["published"],
            finding["measured"],
            stat_text(finding["effect_pct"], 1),
            p_text(finding["p_value"]),
            p_text(finding["p_value_uncorrected"]),
            str(finding["n_seeds"]),
            finding["test"],
        )
        for finding in corpus["findings"]
    )
    return Table(title="The document's findings", header=header, rows=rows)


def exit_table(corpus: Corpus) -> Table:
    """PPL of each method at each exit, with no routing."""
    layers = sorted({layer for entry in corpus["exit_ppl"] for layer in entry["exits"]}, key=int)
    titles = [f"PPL, exit {layer}" for layer in layers]
    header = (
        Column(title="Method", short="Method"),
        Column(title="Epoch", short="Epoch"),
        *(Column(title=title, short=title, kind="number") for title in titles),
    )
    rows = tuple(
        (
            entry["label"],
            entry["epoch"],
            *(stat_text(entry["exits"].get(layer), 2) for layer in layers),
        )
        for entry in corpus["exit_ppl"]
    )
    return Table(title="PPL at each exit", header=header, rows=rows)


def explanations_table(corpus: Corpus) -> Table:
    """The document's explanations as questions, and what the measurement answers."""
    header = (
        Column(title="Question", short="Question"),
        Column(title="Measured", short="Measured"),
        Column(title="p", short="p", kind="number"),
        Column(title="Answer", short="Answer", kind="verdict"),
    )
    rows = tuple(
        (item["question"], item["measured"], p_text(item["p_value"]), item["answer"])
        for item in corpus["explanations"]
    )
    return Table(title="The document's explanations", header=header, rows=rows)


def settings_table(title: str, settings: Mapping[str, object]) -> Table:
    """Names and values: a protocol or an environment."""
    rows = tuple((name, value_text(value)) for name, value in settings.items())
    return Table(title=title, header=(Column(title="Setting"), Column(title="Value")), rows=rows)


def protocol_table(corpus: Corpus) -> Table:
    """What was trained and evaluated, and on which text."""
    return settings_table("Protocol", {**corpus["protocol"], "sha256": corpus["sha256"]})


def environment_table(results: Results) -> Table:
    """Where the results were produced, by which command."""
    seconds = {"seconds": f"{results['seconds']:,.0f}", "command": results["command"]}
    version = {"offramp": results["offramp_version"]}
    return settings_table("Environment", {**version, **results["environment"], **seconds})


def corpus_tables(corpus: Corpus) -> list[Table]:
    """The tables of results on one corpus; those without rows are left out."""
    tables = [findings_table(corpus), *seed_tables(corpus), exit_table(corpus)]
    return [table for table in (*tables, explanations_table(corpus)) if table.rows]


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it stands, also inside a table's cell."""
    for sign in "\\|<*`":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


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


def markdown(results: Results) -> str:
    """The whole of tables.md: every table of every corpus, the notes and the environment."""
    lines = ["# Reproduction of Experiments 5 and 6", ""]
    for name, corpus in results["corpora"].items():
        lines += [f"- {escape_markdown(headline(name, corpus))}"]
    lines += [""]
    for name, corpus in results["corpora"].items():
        lines += [f"## {escape_markdown(name)}", ""]
        for table in (*corpus_tables(corpus), protocol_table(corpus)):
            lines += markdown_table(table, level=3)
        if corpus["notes"]:
            notes = [f"- {escape_markdown(note)}" for note in corpus["notes"]]
            lines += ["### Notes", "", *notes, ""]
    lines += markdown_table(environment_table(results), level=2)
    return "\n".join(lines).rstrip() + "\n"


def rich_tables(results: Results) -> list[rich.table.Table]:
    """The tables of results for a terminal of 100 columns, in their short form."""
    return [
        terminal_table(name, table)
        for name, corpus in results["corpora"].items()
        for table in corpus_tables(corpus)
    ]


def terminal_table(corpus_name: str, table: Table) -> rich.table.Table:
    """One table in its short form; no cell is read as markup."""
    shown = rich.table.Table(
        title=Text(f"{corpus_name}: {table.title}", style="bold"),
        caption=Text("\n".join(table.notes)),
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    kept = [index for index, column in enumerate(table.header) if column.short is not None]
    for index in kept:
        column = table.header[index]
        number = column.kind == "number"
        shown.add_column(
            Text(column.short or ""), justify="right" if number else "left", no_wrap=number
        )
    for row in table.rows:
        shown.add_row(
            *(
                Text(
                    row[index],
                    style=VERDICT_STYLES.get(row[index], "")
                    if table.header[index].kind == "verdict"
                    else "",
                )
                for index in kept
            )
        )
    return shown
