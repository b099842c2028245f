"""The terminal table of ``offramp bench``."""

from collections.abc import Mapping
from typing import Any, Literal

from rich.table import Table


def bench_table(content: Mapping[str, Any]) -> Table:
    """A row for each method."""
    config, block = content["config"], content["parts"]["block"]
    table = Table(
        title=(
            f"{config['prompts']} prompts of {config['prompt_tokens']} tokens, "
            f"{config['max_new_tokens']} new ones each, batch {config['batch_size']}, "
            f"{content['dtype']}, {config['repeats']} times, interleaved"
        ),
        caption=(
            f"median (least to most) after the first token; the memory gives "
            f"{content['bandwidth_gb_s']:.0f} GB/s, which allows "
            f"{content['limit_tokens_per_s']:.1f} tokens/s for a row; a block reads its weights at "
            f"{100 * block['share_of_bandwidth']:.0f}% of that"
        ),
    )
    columns = ("method", "tokens/s", "predicted", "vs hf", "vs full", "worst prompt", "mean layers")
    for column in (*columns, "acceptance", "greedy's tokens"):
        side: Literal["left", "right"] = "left" if column == "method" else "right"
        table.add_column(column, justify=side, no_wrap=column in ("method", "tokens/s"))
    for row in content["rows"]:
        rate = row["tokens_per_s"]
        table.add_row(
            row["method"],
            f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})",
            _number(row["predicted_tokens_per_s"], ".1f"),
            _number(row["speedup_vs_hf"], ".2f"),
            _number(row["speedup_vs_full"], ".2f"),
            _number(row["speedup_vs_full_worst"], ".2f"),
            _number(row["mean_layers"], ".1f"),
            "-" if row["acceptance_rate"] is None else f"{100 * row['acceptance_rate']:.0f}%",
            "yes" if row["identical_to_greedy"] else "no",
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
