"""offramp specialise."""

from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.cli.base import Device, Threads, open_for, output, say, use


def specialise(
    model: Path,
    *,
    corpus: str,
    out: Path,
    specialising: Annotated[SpecialiseConfig | None, Parameter(name="*")] = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Teach each exit of a trained model the tokens that leave there, the backbone frozen.

    Exits that have at most a norm get a residual block and an LM head of their own, too. Gates
    and temperatures are fitted to them anew.

    Parameters
    ----------
    model
        A folder that ``offramp train`` or ``offramp tune`` wrote.
    corpus
        The text that it was trained on: exits and gates learn from its training text.
    out
        Folder for the new model.
    """
    from rich.table import Table

    from offramp.commands.specialise import specialise as run_specialise

    use(device, threads)
    found = run_specialise(
        open_for(model, device=device, dtype=None),
        corpus,
        out,
        specialising or SpecialiseConfig(),
        on_stage=say,
    )
    table = Table(title="At the budget; PPL of all tokens of the validation text")
    for column in ("exit layer", "training tokens that left", "PPL before", "after"):
        table.add_column(column, justify="right")
    for layer, share in found["left"].items():
        ppl = (f"{found[when][layer]:.3f}" for when in ("before", "after"))
        table.add_row(str(layer), f"{100 * share:.1f}%", *ppl)
    output().print(table)
    say(
        f"{out} holds the model. Measure it on other text with: "
        f"offramp confidence {quote(str(out))} --corpus OTHER"
    )
