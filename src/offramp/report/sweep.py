"""The terminal table of a threshold sweep, and the verdict under it."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from offramp.report.fit import fit_table
from offramp.report.text import missing_kv_text, ppl_text, threshold_text

LEAST_IMPORTANT = ("share by exit layer", "Shallow%", "Compute%")
"""Columns that are dropped where the terminal is too narrow, the first one first."""
NEGLIGIBLE = 1.01
"""PPL, relative to full depth, up to which a threshold is called as good."""


def sweep_table(result: Mapping[str, Any], *, width: int = 120) -> Table:
    """One row for each threshold, from what ``offramp sweep`` writes."""
    ppl = "  ".join(f"{layer}: {ppl_text(value, 3)}" for layer, value in result["exit_ppl"].items())
    fitted = ", temperatures fitted" if result.get("temperatures") else ""
    table = Table(
        title=f"{result['n_tokens']:,} tokens of {result['corpus']['name']}, "
        f"thresholds on {result.get('confidence', 'max_prob')}",
        caption=f"PPL by exit layer  {ppl}  ({missing_kv_text(result)}{fitted})",
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
            threshold_text(row["threshold"]),
            ppl_text(row["ppl"], 3),
            f"{row['shallow_pct']:.1f}",
            f"{row['compute_pct']:.1f}",
            *([f"{row['flops_pct']:.1f}"] if costed else []),
            shares,
        )
    return fit_table(table, width, least_important=LEAST_IMPORTANT)


def sweep_verdict(result: Mapping[str, Any]) -> str:
    """Which threshold saves the most at hardly any loss, in one sentence."""
    by = "flops_pct" if result["rows"][0].get("flops_pct") is not None else "compute_pct"
    cost_name = "FLOPs (heads and gates counted)" if by == "flops_pct" else "layers"
    full = list(result["exit_ppl"].values())[-1]
    good = [row for row in result["rows"] if row["ppl"] <= NEGLIGIBLE * full and row[by] < 100]
    if not good:
        return (
            f"None of these thresholds saves {cost_name} at a PPL within 1% of full depth's "
            f"{ppl_text(full, 3)}."
        )
    best = min(good, key=lambda row: row[by])
    return (
        f"Threshold {threshold_text(best['threshold'])} costs {best[by]:.1f}% of the full model's "
        f"{cost_name} at PPL {ppl_text(best['ppl'], 3)}; full depth has {ppl_text(full, 3)}."
    )
