"""A study's tables, plots and page, from the content of its study.json."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.files import replacing
from offramp.report import study_plots
from offramp.report.html import make_figure, page_environment
from offramp.report.plots import save_png
from offramp.report.tables import Column, Table, markdown_table
from offramp.report.text import p_text

Content = Mapping[str, Any]
Row = Mapping[str, Any]


def write(content: Content, times: Content, out: Path) -> None:
    """The tables, two pictures and the page, each whole or not at all."""
    with replacing(out / "table.md") as aside:
        aside.write_text(markdown(content), encoding="utf-8")
    with replacing(out / "figure.png") as aside:
        save_png(study_plots.recipes(content), aside)
    with replacing(out / "frontier.png") as aside:
        save_png(study_plots.frontiers(content, _usual(content), "recompute"), aside)
    with replacing(out / "report.html") as aside:
        aside.write_text(page(content, times), encoding="utf-8", newline="\n")


def page(content: Content, times: Content) -> str:
    """One self-contained page: the answers, the tables, and frontiers to point at."""
    environment, javascript = page_environment()
    figures = [study_plots.recipes(content)]
    figures += [
        study_plots.frontiers(content, confidence, missing_kv)
        for confidence, missing_kv in _families(content)
    ]
    figures.append(study_plots.frontiers(content, _usual(content), "recompute", "compute_pct"))
    figures.append(study_plots.measured(times, _usual(content)))
    return environment.get_template("study.html.jinja").render(
        content=content,
        how=how(content),
        tables=tables(content),
        figures=[make_figure(chart) for chart in figures],
        vega=javascript,
        version=content["offramp_version"],
    )


def markdown(content: Content) -> str:
    """What was asked and answered, how, and the tables."""
    lines = [f"# Study: {content['study']}", "", content["question"], ""]
    for answer in content["answers"]:
        lines += [f"- {answer}"]
    lines += ["", how(content), ""]
    for table in tables(content):
        lines += [*markdown_table(table, 2), ""]
    return "\n".join(lines)


def how(content: Content) -> str:
    """How the figures came about, in words."""
    seeds = len(content["seeds"])
    frontier = content["runs"][0]["frontier"]
    inner = {kv: len(frontier[kv]) - 2 for kv in ("recompute", "propagate")}
    return (
        f"Text: {content['text']['corpus']}; {content['text']['split']}, of which the first "
        f"{content['test_tokens']:,} tokens. {content['train_tokens']:,} training tokens a run, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}; mean ± sample standard deviation of the "
        "PPL. FLOPs% counts layers, exit heads and gates relative to the standard model; Compute% "
        "is layers run / layers in the model. Thresholds are quantiles on held-out training text; "
        "PPL between them is interpolated in logs, between "
        f"{inner['recompute']} of them under recompute and {inner['propagate']} under propagate, "
        "where each takes a pass of its own, which makes it look a little worse than it is. "
        "Static: a shallower model without exits, trained on the same tokens, interpolated "
        "between its depths. Gates, "
        "and the exits of a recipe that specialises them, are fitted afterwards to a sample of "
        "the same training text, the backbone frozen; static models have neither. A ratio below 1 "
        "is better; in brackets its 95% bootstrap interval over seeds and stretches of the text, "
        "which with few seeds is little more than their range, and too narrow: trust p. p: paired "
        "t test over the seeds' log ratios, Holm's correction over the recipes."
    )


def tables(content: Content) -> list[Table]:
    """The exits, a table of routed figures for each measure and convention, the static models."""
    routed = [
        _routed_table(content, confidence, missing_kv)
        for confidence, missing_kv in _families(content)
    ]
    found = [search_table(content), frontier_table(content)] if "search" in content else []
    return [*found, _exit_table(content), *routed, _static_table(content)]


def search_table(content: Content) -> Table:
    """What ``offramp recipe`` tried, and chose."""
    budget = f"{content['compared_at']:g}%"
    header = (
        Column(title="Question", short="Question"),
        Column(title="Recipe", short="Recipe"),
        Column(title=f"Held-out PPL at {budget} of FLOPs", short=f"PPL at {budget}", kind="number"),
        Column(title="Chosen", short="Chosen"),
    )
    rows = tuple(
        (
            entry["question"],
            entry["label"],
            _number(entry["held_out_ppl"], ".3f"),
            "yes" if entry["chosen"] else "",
        )
        for entry in content["search"]
    )
    notes = ("A dash: no policy of that recipe keeps the budget.",)
    return Table(
        title="The search, on held-out training text", header=header, rows=rows, notes=notes
    )


def frontier_table(content: Content) -> Table:
    """What the recipe that ``offramp recipe`` found is worth at each cost, and how surely."""
    row = content["summary"][0]
    kinds: tuple[tuple[str, str], ...] = (
        ("FLOPs%", "FLOPs%"),
        ("Compute%", "Compute%"),
        ("PPL", "PPL"),
        ("95% interval", "95% interval"),
        ("to static models of equal cost", "to static"),
        ("to the standard model at 100%", "to standard"),
    )
    header = tuple(Column(title=title, short=short, kind="number") for title, short in kinds)
    rows = tuple(
        (
            point,
            _number(row["compute_pct_at"][point], ".1f"),
            spread(ppl),
            "–"
            if ppl["interval"] is None
            else " to ".join(f"{end:.3f}" for end in ppl["interval"]),
            _ratio(row["ratio_to_static_at"][point]),
            _ratio(row["ratio_to_standard_at"][point]),
        )
        for point, ppl in row["ppl_at"].items()
    )
    title = f'The recipe, leaving by {row["confidence"]}, missing_kv = "{row["missing_kv"]}"'
    return Table(title=title, header=header, rows=rows)


def rows_of(content: Content, confidence: str, missing_kv: str) -> list[Row]:
    """The recipes' rows under one measure and convention, in the study's order."""
    return [
        row
        for row in content["summary"]
        if (row["confidence"], row["missing_kv"]) == (confidence, missing_kv)
    ]


def _families(content: Content) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["confidence"], row["missing_kv"]) for row in content["summary"]))


def _usual(content: Content) -> str:
    """The measure of the picture that stands beside the table: the first."""
    return str(_families(content)[0][0])


def _exit_table(content: Content) -> Table:
    baseline = any("final_to_baseline" in row for row in content["summary"])
    header = [
        Column(title="Recipe"),
        Column(title="Loss weights"),
        Column(title="Exit PPL", kind="number"),
        Column(title="Last layer's PPL", kind="number"),
        Column(title="to standard", kind="number"),
        Column(title="p", kind="number"),
    ]
    if baseline:
        header += [Column(title="to baseline", kind="number"), Column(title="p", kind="number")]
    rows = []
    for row in rows_of(content, *_families(content)[0]):
        cells = [
            row["label"],
            row["loss_weights"],
            _exits(row),
            spread(row["final_ppl"]),
            *_tested(row["final_to_standard"]),
        ]
        rows.append((*cells, *(_tested(row["final_to_baseline"]) if baseline else ())))
    return Table(title="The exits and the last layer", header=tuple(header), rows=tuple(rows))


def _routed_table(content: Content, confidence: str, missing_kv: str) -> Table:
    points = list(content["summary"][0]["ppl_at"])
    compared = content["compared_at"]
    header = [
        Column(title="Recipe"),
        *(Column(title=f"PPL at {point}%", kind="number") for point in points),
        Column(title=f"Compute% at {compared:g}%", kind="number"),
        Column(title=f"to static at {compared:g}%", kind="number"),
        Column(title="p", kind="number"),
        Column(title="area to static", kind="number"),
        Column(title="to standard at 100%", kind="number"),
    ]
    rows = tuple(
        (
            row["label"],
            *(spread(row["ppl_at"][point]) for point in points),
            _number(row["compute_pct_at"][f"{compared:g}"], ".1f"),
            *_tested(row["to_static"]),
            _ratio(row["area"]),
            _ratio(row["ratio_to_standard_at"][f"{compared:g}"]),
        )
        for row in rows_of(content, confidence, missing_kv)
    )
    title = f'Routed by {confidence}, missing_kv = "{missing_kv}", at shares of FLOPs%'
    notes = (
        f"To standard at 100%: the recipe at {compared:g}% of FLOPs against the standard model. "
        f"Area: mean log PPL from {content['area'][0]:g} to {content['area'][1]:g}% of FLOPs.",
    )
    return Table(title=title, header=tuple(header), rows=rows, notes=notes)


def _static_table(content: Content) -> Table:
    header = (
        Column(title="Layers", kind="number"),
        Column(title="Compute%", kind="number"),
        Column(title="FLOPs%", kind="number"),
        Column(title="PPL", kind="number"),
    )
    rows = tuple(
        (
            str(layers),
            _number(entries[0]["compute_pct"], ".1f"),
            _number(entries[0]["flops_pct"], ".1f"),
            spread(_stat([entry["ppl"] for entry in entries])),
        )
        for layers, entries in statics(content).items()
    )
    return Table(title="Static models", header=header, rows=rows)


def statics(content: Content) -> dict[int, list[Row]]:
    """The static models' entries, one a seed, by depth, the deepest first."""
    found: dict[int, list[Row]] = {}
    for entry in sorted(content["static"], key=lambda entry: -int(entry["layers"])):
        found.setdefault(entry["layers"], []).append(entry)
    return found


def early_exits(row: Row) -> list[tuple[int, Row]]:
    """(layer, PPL) of the exits below the last layer."""
    return sorted((int(layer), stat) for layer, stat in row["exit_ppl"].items())[:-1]


def spread(stat: Row, *, digits: int = 3) -> str:
    """Mean ± standard deviation; a dash where there is nothing to say."""
    if stat["mean"] is None:
        return "–"
    mean = _number(stat["mean"], f".{digits}f")
    return mean if stat["std"] is None else f"{mean} ± {_number(stat['std'], f'.{digits}f')}"


def _exits(row: Row) -> str:
    return " / ".join(f"{layer}: {spread(stat)}" for layer, stat in early_exits(row))


def _tested(ratio: Row) -> Iterator[str]:
    yield _ratio(ratio)
    yield p_text(ratio["p_holm"])


def _ratio(ratio: Row) -> str:
    if ratio["mean"] is None:
        return "–"
    if ratio["interval"] is None:
        return _number(ratio["mean"], ".3f")
    low, high = ratio["interval"]
    return f"{_number(ratio['mean'], '.3f')} [{_number(low, '.3f')}, {_number(high, '.3f')}]"


def _number(value: float | str | None, form: str) -> str:
    """A figure of study.json, where infinity is written as "inf"."""
    return "–" if value is None else format(float(value), form)


def _stat(values: Sequence[float] | Iterable[float]) -> dict[str, Any]:
    numbers = [float(value) for value in values]
    mean = sum(numbers) / len(numbers)
    if len(numbers) < 2:
        return {"mean": mean, "std": None}
    variance = sum((value - mean) ** 2 for value in numbers) / (len(numbers) - 1)
    return {"mean": mean, "std": variance**0.5}
