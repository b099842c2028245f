"""The terminal tables of ``offramp evaluate``, one for each task, and the verdict under them."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
from rich.table import Table

from offramp.report.fit import fit_table
from offramp.report.text import NONE, number_text

Row = Mapping[str, Any]
LEAST_IMPORTANT = ("missing kv", "tokens/s", "documents")
"""Columns that are dropped where the terminal is too narrow, the first one first; then metrics."""


def evaluation_tables(content: Mapping[str, Any], *, width: int) -> list[Table]:
    """One table for each task or group: a row for each way to run the model."""
    rows: list[Row] = content["evaluations"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return [
        _table(task, [row for row in rows if row["task"] == task], content, width) for task in tasks
    ]


def _table(task: str, rows: Sequence[Row], content: Mapping[str, Any], width: int) -> Table:
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    table = Table(
        title=_title(task, rows[0]),
        caption=_caption(rows, content),
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    headers = ("method", *metrics, "layers", "FLOPs%", "tokens/s", "missing kv")
    for header in headers:
        table.add_column(header, justify="left" if header in ("method", "missing kv") else "right")
    for row in rows:
        table.add_row(
            row["method"],
            *(_metric(row, name) for name in metrics),
            number_text(row["mean_layers"], 1),
            number_text(row["flops_pct"], 1),
            number_text(row["tokens_per_s"], 1),
            row["missing_kv"] or NONE,
        )
    return fit_table(table, width, least_important=(*LEAST_IMPORTANT, *metrics[:0:-1]))


def _title(task: str, row: Row) -> str:
    parts = [task]
    if row["documents"] is not None:
        parts.append(f"{row['documents']:,} documents")
    if row["num_fewshot"]:
        parts.append(f"{row['num_fewshot']} examples each")
    return ", ".join(parts)


def _caption(rows: Sequence[Row], content: Mapping[str, Any]) -> str:
    notes = ["metric ± the harness's standard error"]
    confidences = sorted({row["confidence"] for row in rows if row["confidence"]})
    if confidences:
        notes.append(f"exits by {', '.join(confidences)}")
    notes.append(
        f"layers of {content['num_layers']} and FLOPs% for each scored or generated token; "
        "contexts run at full depth"
    )
    if cut := max(row["truncated"] for row in rows):
        notes.append(f"{cut:,} requests were too long and lost tokens at their start")
    return "; ".join(notes)


def _metric(row: Row, name: str) -> str:
    value, error = row["metrics"].get(name), row["stderr"].get(name)
    if value is None:
        return NONE
    shown = f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
    return shown if error is None else f"{shown} ± {error:.4f}"


def evaluation_verdict(content: Mapping[str, Any]) -> str:
    """Say what is worth knowing of the rows, in one sentence; empty for a single way to run."""
    rows: list[Row] = content["evaluations"]
    full = {row["task"]: row for row in rows if row["method"] == "full"}
    others = [row for row in rows if row["threshold"] is not None]
    if not others:
        return ""
    if all(row["mean_layers"] == content["num_layers"] for row in others):
        return (
            "No token left early: at this threshold none may, or each scored text has one token, "
            "which its context predicts at full depth."
        )
    if not full:
        return ""
    methods = list(dict.fromkeys(row["method"] for row in others))
    good = [
        method
        for method in methods
        if all(_as_good(row, full[row["task"]]) for row in others if row["method"] == method)
    ]
    if not good:
        return (
            "Each of these thresholds is more than one standard error worse than full depth in "
            "some metric."
        )
    best = min(good, key=lambda method: _cost(others, method))
    return (
        f"{best} is within one standard error of full depth in every metric; its tokens ran "
        f"{_cost(others, best):.1f} of {content['num_layers']} layers."
    )


def _cost(rows: Sequence[Row], method: str) -> float:
    """Return the mean layers of a method's tokens over the tasks."""
    mine = [row for row in rows if row["method"] == method and row["tokens"]]
    tokens = sum(row["tokens"] for row in mine)
    return float(sum(row["mean_layers"] * row["tokens"] for row in mine) / max(1, tokens))


def _as_good(row: Row, full: Row) -> bool:
    """Return whether each metric with a standard error is at most one of them worse."""
    for name, value in row["metrics"].items():
        whole, error = full["metrics"].get(name), full["stderr"].get(name)
        better = row["higher_is_better"].get(name)
        if value is None or whole is None or error is None or better is None:
            continue
        if (whole - value if better else value - whole) > error:
            return False
    return True
