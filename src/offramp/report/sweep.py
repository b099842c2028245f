"""The terminal table of a threshold sweep."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from offramp.report.text import ppl_text


def sweep_table(result: Mapping[str, Any]) -> Table:
    """One row for each threshold, from what ``offramp sweep`` writes."""
    ppl = "  ".join(f"{layer}: {ppl_text(value, 3)}" for layer, value in result["exit_ppl"].items())
    table = Table(
        title=f"{result['n_tokens']:,} tokens of {result['corpus']['name']}",
        caption=f'PPL by exit layer  {ppl}  (missing_kv="{result["missing_kv"]}")',
    )
    costed = any(row.get("flops_pct") is not None for row in result["rows"])
    flops = ("FLOPs%",) if costed else ()
    for column in ("threshold", "PPL", "Shallow%", "Compute%", *flops, "share by exit layer"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        shares = "  ".join(
            f"{layer}: {100 * share:.1f}%" for layer, share in row["exit_share"].items()
        )
        table.add_row(
            str(row["threshold"]),
            f"{row['ppl']:.3f}",
            f"{row['shallow_pct']:.1f}",
            f"{row['compute_pct']:.1f}",
            *([f"{row['flops_pct']:.1f}"] if costed else []),
            shares,
        )
    return table
