"""The terminal tables of ``offramp bench``: a row for each method, and the ratios between them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import rich.box
from rich.table import Table

from offramp.report.fit import fit_table

Row = Mapping[str, Any]
LEAST_IMPORTANT = (
    *("range", "predicted", "prefill", "worst prompt", "acceptance", "vs hf", "same tokens"),
    *("layers", "of limit"),
)
"""Columns that are dropped where the terminal is too narrow, the first one first."""


def bench_table(content: Mapping[str, Any], *, width: int) -> Table:
    """A row for each method, in a table of at most ``width`` characters.

    With several weight formats there is a section for each number of bits.
    """
    table = Table(
        title=_title(content),
        caption=_caption(content),
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    columns = ("method", "tokens/s", "PPL", "first token", "of limit", "vs full", "layers")
    more = ("same tokens", "vs hf", "worst prompt", "acceptance", "prefill", "predicted", "range")
    for column in (*columns, *more):
        side: Literal["left", "right"] = "left" if column == "method" else "right"
        table.add_column(column, justify=side)
    sections = sections_of(content["rows"])
    for name, rows in sections.items():
        if len(sections) > 1:
            table.add_section()
            table.add_row(f"{name}:")
        for row in rows:
            table.add_row(*_cells(row))
    return fit_table(table, width, least_important=LEAST_IMPORTANT)


def sections_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by weight format: rows of llama.cpp are with those of as many bits."""
    sections: dict[str, list[Row]] = {}
    for row in rows:
        same = [name for name, own in sections.items() if own[0]["bits"] == row["bits"]]
        sections.setdefault(same[0] if same else row["weights"], []).append(row)
    return sections


def _title(content: Mapping[str, Any]) -> str:
    config = content["config"]
    return (
        f"prompts: {config['prompts']} of {config['prompt_tokens']} tokens, "
        f"{config['max_new_tokens']} new tokens each; batch size {config['batch_size']}; "
        f"{', '.join(content['formats'])}; repeats: {config['repeats']}, interleaved"
    )


def _caption(content: Mapping[str, Any]) -> str:
    limits = ", ".join(
        f"{about['limit_tokens_per_s']:.1f}" for about in content["formats"].values()
    )
    block = content["parts"]["block"]
    config = content["config"]
    return (
        f"median tokens/s after the first token; PPL of {config['ppl_tokens']:,} tokens; of limit: "
        f"of memory bandwidth / bytes of weights per token; memory bandwidth is "
        f"{content['bandwidth_gb_s']:.0f} GB/s, so at most {limits} tokens/s for one prompt at "
        f"full depth; a block reads its weights at {100 * block['share_of_bandwidth']:.0f}% of the "
        "bandwidth"
    )


def _cells(row: Row) -> list[str]:
    rate = row["tokens_per_s"]
    return [
        row["method"],
        f"{rate['median']:.1f}",
        _number(row["ppl"], ".2f" if (row["ppl"] or 0) < 1000 else ".3g"),
        f"{1000 * row['first_token_s']:.0f} ms",
        _percent(row["share_of_limit"]),
        _number(row["speedup_vs_full"], ".2f"),
        _number(row["mean_layers"], ".1f"),
        "yes" if row["identical_to_greedy"] else "no",
        _number(row["speedup_vs_hf"], ".2f"),
        _number(row["speedup_vs_full_worst"], ".2f"),
        _percent(row["acceptance_rate"]),
        _number(row["prefill_tokens_per_s"], ".0f"),
        _number(row["predicted_tokens_per_s"], ".1f"),
        f"{rate['min']:.1f} to {rate['max']:.1f}",
    ]


def summary_table(content: Mapping[str, Any], *, width: int) -> Table:
    """The ratios of medians, with their range over the prompts."""
    prefill = content["config"]["prefill_tokens"] or content["config"]["prompt_tokens"]
    table = Table(
        title="ratio of median speeds",
        caption="range: from the worst prompt to the best one, each the median of its repeats",
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in ("method", "beside", "ratio", "range", ">= 0.95"):
        table.add_column(column, justify="left" if column in ("method", "beside") else "right")
    several = len(content["formats"]) > 1
    for row in content["summary"]:
        name = f"{row['method']} {row['weights']}" if several else row["method"]
        table.add_row(
            name if row["of"] == "decoding" else f"{name}, {prefill:,} tokens' prefill",
            row["beside"],
            f"{row['ratio']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
            f"{row['nearly']} of {row['prompts']}",
        )
    return fit_table(table, width, least_important=(">= 0.95", "range"))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
