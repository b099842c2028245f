"""The terminal table of ``offramp probe``."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from offramp.report.fit import fit_table
from offramp.report.text import ppl_text


def probe_table(content: Mapping[str, Any], *, width: int = 120) -> Table:
    """A row for each exit."""
    table = Table(
        title=f"{content['n_tokens']:,} tokens of {content['corpus']['name']}",
        caption="agreement with the last layer's first choice; in brackets the share of tokens "
        "(coverage) whose max_prob is at least that, and their agreement",
    )
    levels = list(content["exits"][0]["coverage"])
    for column in ("exit", "PPL", "agreement", *(f">= {level}" for level in levels), "head cost"):
        table.add_column(column, justify="right")
    for row in content["exits"]:
        cost = row["head_cost_layers"]
        table.add_row(
            str(row["exit_layer"]),
            ppl_text(row["ppl"]),
            f"{100 * row['agreement']:.1f}%",
            *(_level(row, level) for level in levels),
            "-" if cost is None else f"{cost:.2f} layers",
        )
    return fit_table(table, width, least_important=(">= 0.7", ">= 0.5", ">= 0.8", ">= 0.95"))


def _level(row: Mapping[str, Any], level: str) -> str:
    right = row["agreement_at"][level]
    share = f"[{100 * row['coverage'][level]:.0f}%]"
    return share if right is None else f"{share} {100 * right:.0f}%"
