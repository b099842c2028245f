"""The terminal tables of ``offramp tune`` and ``offramp specialise``, and their verdicts."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from offramp.report.fit import fit_table
from offramp.report.text import ppl_text

Content = Mapping[str, Any]


def tune_table(trained: Content, *, width: int) -> Table:
    """A row for each exit: agreement and PPL before and after, on held-out tokens."""
    table = Table(title=f"{trained['held_out_tokens'] - 1:,} held-out tokens")
    for column in ("exit layer", "agreement before", "agreement", "PPL before", "PPL"):
        table.add_column(column, justify="right")
    for before, after in zip(trained["before"], trained["after"], strict=True):
        table.add_row(
            str(after["exit_layer"]),
            *(f"{100 * row['agreement']:.1f}%" for row in (before, after)),
            *(ppl_text(row["ppl"]) for row in (before, after)),
        )
    return fit_table(table, width, least_important=("agreement before", "PPL before"))


def tune_verdict(trained: Content) -> str:
    """What tuning did to the first exit."""
    before, after = trained["before"][0], trained["after"][0]
    return (
        f"At layer {after['exit_layer']} the exit now makes the last layer's prediction for "
        f"{100 * after['agreement']:.1f}% of the tokens ({100 * before['agreement']:.1f}% before "
        f"tuning); its PPL is {ppl_text(after['ppl'])}, and the last layer's "
        f"{ppl_text(trained['after'][-1]['ppl'])}."
    )


def shared_verdict(trained: Content) -> str:
    """What shared keys and values cost the last layer."""
    found, source = trained["shared_kv"]["ppl"], trained["kv_source"]
    fitted = f"{ppl_text(found['fitted'])} after the least-squares fit"
    if "distilled" in found:
        fitted += f" and {ppl_text(found['distilled'])} after distillation"
    return (
        f"The blocks above layer {source} now share keys and values, and a token that leaves at "
        f"layer {source} or above leaves all of them. The last layer's PPL was "
        f"{ppl_text(found['model'])}; it is {fitted}."
    )


def specialise_table(found: Content, *, width: int) -> Table:
    """A row for each exit: who exits there at the budget, and PPL before and after."""
    table = Table(title="At the budget; PPL of all tokens of the validation text")
    for column in ("exit layer", "training tokens that left", "PPL before", "PPL"):
        table.add_column(column, justify="right")
    for layer, share in found["left"].items():
        before = f"{found['before'][layer]:.3f}" if layer in found["before"] else "none"
        table.add_row(str(layer), f"{100 * share:.1f}%", before, f"{found['after'][layer]:.3f}")
    return fit_table(table, width, least_important=("PPL before",))


def specialise_verdict(found: Content) -> str:
    """How many tokens exit early; the PPL of all tokens is no measure of specialised exits."""
    early = 100 * sum(share for layer, share in list(found["left"].items())[:-1])
    return (
        f"{early:.1f}% of the training tokens exit early at the budget. Each exit now predicts "
        "these tokens better and the others possibly worse; full depth is unchanged."
    )
