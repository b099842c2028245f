"""The tables of a reproduction, from its results: as values, as Markdown and for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.table

from offramp.report.tables import (
    Column,
    Table,
    escape_markdown,
    markdown_table,
    terminal_table,
)
from offramp.report.text import (
    NONE,
    SEED_CITATION,
    SIZE_MEANING,
    Corpus,
    Results,
    headline,
    interval_text,
    number_text,
    outside_notes,
    p_text,
    power_text,
    sizes_text,
    stat_text,
    value_text,
    verdicts_text,
    weights_text,
)

SEED_TABLES = {
    "exp5_results": "Experiment 5: results",
    "exp5_thresholds": "Experiment 5: thresholds",
    "exp6_results": "Experiment 6: results",
    "exp6_thresholds": "Experiment 6: thresholds",
    "baselines": "Baselines",
}


def seed_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One of the document's tables: published beside measured, and every seed's value."""
    header = (
        Column(title="Method", short="Method"),
        Column(title="Epoch", short="Epoch", dropped=3),
        Column(title="Threshold", short="Thr.", kind="number"),
        Column(title="PPL, published", short="PPL\npubl.", kind="number"),
        Column(title="PPL, measured", short="PPL\nmeasured", kind="number"),
        Column(title="Distance (std)", kind="number"),
        Column(title="Shallow%, published", short="Sh%\npubl.", kind="number", dropped=5),
        Column(title="Shallow%, measured", short="Sh%\nmeasured", kind="number", dropped=4),
        Column(title="Compute%, published", short="C%\npubl.", kind="number", dropped=2),
        Column(title="Compute%, measured", short="C%\nmeasured", kind="number", dropped=1),
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
        "Measured: mean ± sample standard deviation over the seeds. Distance: published minus "
        f"measured PPL, in units of that deviation. missing_kv: {modes}."
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
        Column(title="Direction", short="Direction", kind="verdict"),
        Column(title="Size", short="Size", dropped=4),
        Column(title="95% interval, %", short="95%\ninterval, %", kind="number", dropped=3),
        Column(title="Published", short="Published", dropped=1),
        Column(title="Measured", short="Measured", dropped=2),
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
            finding.get("size") or NONE,
            interval_text(finding.get("ci_pct")),
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
    notes = [f"{verdicts_text(corpus)}."]
    if any(finding.get("size") for finding in corpus["findings"]):
        notes += [sizes_text(corpus), SIZE_MEANING]
    if corpus.get("power"):
        notes.append(power_text(corpus["power"]))
    return Table(title="The document's findings", header=header, rows=rows, notes=tuple(notes))


def power_table(corpus: Corpus) -> Table:
    """How likely each finding is to be decided, as it was known before the run."""
    power = corpus.get("power") or {"by_finding": {}, "spreads": {}}
    header = (
        Column(title="Finding", kind="number"),
        Column(title="Power", kind="number"),
        Column(title="Spread over seeds (log PPL ratio)", kind="number"),
    )
    rows = tuple(
        (finding, number_text(value, 2), number_text(power["spreads"][finding], 3))
        for finding, value in power["by_finding"].items()
    )
    notes = (power_text(power), f"Spreads: {power['spreads_from']}.") if rows else ()
    return Table(title="Power, known before the run", header=header, rows=rows, notes=notes)


def grid_table(corpus: Corpus) -> Table:
    """The alphas and thresholds that the command asked for; no rows if it asked for none."""
    header = (
        Column(title="Method", short="Method"),
        Column(title="Threshold", short="Thr.", kind="number"),
        Column(title="PPL", short="PPL", kind="number"),
        Column(title="Against standard, %", short="vs std. %", kind="number", dropped=3),
        Column(title="95% interval, %", short="95% interval, %", kind="number", dropped=2),
        Column(title="Shallow%", short="Sh%", kind="number", dropped=1),
        Column(title="Compute%", short="C%", kind="number"),
    )
    rows = tuple(
        (
            row["label"],
            number_text(row["threshold"], 2),
            stat_text(row["measured"]["ppl"], 2),
            stat_text(row["effect_pct"], 1),
            interval_text(row["ci_pct"]),
            stat_text(row["measured"]["shallow_pct"], 1),
            stat_text(row["measured"]["compute_pct"], 1),
        )
        for row in corpus.get("grid", ())
    )
    notes = ("Against standard: the PPL against that of the standard 3-layer model.",)
    return Table(title="Chosen alphas and thresholds", header=header, rows=rows, notes=notes)


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
    last = [entry for entry in corpus["exit_ppl"] if entry["epoch"] == "best"]
    if not last:
        return Table(title="PPL at each exit", header=header, rows=rows)
    ppl = {entry["label"]: entry["exits"][max(entry["exits"], key=int)] for entry in last}
    best = min(ppl, key=lambda label: float(ppl[label]["mean"]))
    verdict = (
        f"{best} has the lowest PPL at its last layer, {stat_text(ppl[best], 2)} (best epoch)."
    )
    return Table(title="PPL at each exit", header=header, rows=rows, notes=(verdict,))


def explanations_table(corpus: Corpus) -> Table:
    """The document's explanations as questions, and what the measurement answers."""
    header = (
        Column(title="Question", short="Question"),
        Column(title="Measured", short="Measured", dropped=1),
        Column(title="p", short="p", kind="number"),
        Column(title="Answer", short="Answer", kind="verdict"),
    )
    rows = tuple(
        (item["question"], item["measured"], p_text(item["p_value"]), item["answer"])
        for item in corpus["explanations"]
    )
    said = [item["answer"] for item in corpus["explanations"]]
    counts = ", ".join(f"{answer}: {said.count(answer)}" for answer in dict.fromkeys(said))
    notes = (f"Answers: {counts}.",) if counts else ()
    return Table(title="The document's explanations", header=header, rows=rows, notes=notes)


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
    tables = [findings_table(corpus), grid_table(corpus), *seed_tables(corpus), exit_table(corpus)]
    return [table for table in (*tables, explanations_table(corpus)) if table.rows]


def markdown(results: Results) -> str:
    """The whole of tables.md: every table of every corpus, the notes and the environment."""
    lines = ["# Reproduction of Experiments 5 and 6", "", SEED_CITATION, ""]
    for name, corpus in results["corpora"].items():
        lines += [f"- {escape_markdown(headline(name, corpus))}"]
    lines += [""]
    for name, corpus in results["corpora"].items():
        lines += [f"## {escape_markdown(name)}", ""]
        power = [table for table in (power_table(corpus),) if table.rows]
        for table in (*corpus_tables(corpus), *power, protocol_table(corpus)):
            lines += markdown_table(table, level=3)
        if corpus["notes"]:
            notes = [f"- {escape_markdown(note)}" for note in corpus["notes"]]
            lines += ["### Notes", "", *notes, ""]
    lines += markdown_table(environment_table(results), level=2)
    return "\n".join(lines).rstrip() + "\n"


def rich_tables(results: Results, width: int) -> list[rich.table.Table]:
    """The tables of results for a terminal of that width, in their short form."""
    return [
        terminal_table(name, table, width)
        for name, corpus in results["corpora"].items()
        for table in corpus_tables(corpus)
    ]
