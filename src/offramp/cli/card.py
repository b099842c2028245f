"""offramp card."""

from pathlib import Path
from shlex import quote

from offramp.cli.base import Base, Model, check_out_file, open_for, output, say
from offramp.cli.interrupts import work_begins
from offramp.cli.plain_text import write_text
from offramp.commands.push_config import branch_name, check_license


def card(
    model: Model,
    *,
    name: str | None = None,
    license: str | None = None,
    sweep: Path | None = None,
    certificate: Path | None = None,
    replace_card: bool = False,
    out: Path | None = None,
    base: Base = None,
) -> None:
    """Print a model card (README.md) with what is known of a model; offramp push uploads one.

    Parameters
    ----------
    name
        The name that the model has, or will have, on the hub: OWNER/NAME.
    license
        The license of the model, such as apache-2.0.
    sweep
        A JSON file of ``offramp sweep --out`` for this model: its table is in the card.
    certificate
        A certificate of this model: what it guarantees is in the card.
    replace_card
        Replace a card at --out even if somebody wrote or edited it by hand.
    out
        Write the card to this file, such as MODEL/README.md, instead of printing it.
    """
    check_out_file(out)
    check_license(license)
    named = None if name is None else str(branch_name(name))

    from offramp.commands.card import card_of, write_card

    work_begins()
    opened = open_for(model, base=base, device="cpu", dtype=None)
    text = card_of(opened, name=named, license=license, sweep=sweep, certificate=certificate)
    if out is None:
        write_text(output(), text)
        return
    write_card(out, text, replace=replace_card)
    say(f"Wrote {quote(str(out))}")
