"""offramp specialise."""

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.cli.base import Base, Device, Model, Threads, open_for, output, say, say_verdict, use


def specialise(
    model: Model,
    *,
    corpus: str,
    out: Path,
    specialising: Annotated[SpecialiseConfig | None, Parameter(name="*")] = None,
    base: Base = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Teach each exit of a trained model the tokens that leave there, the backbone frozen.

    The budget counts what decoding computes, which includes the keys and values above the exit of
    a token that leaves. Exits that have at most a norm get a residual block and an LM head of their
    own, too. Gates and temperatures are fitted to the new exits.

    Parameters
    ----------
    corpus
        The text that it was trained on: exits and gates learn from its training text.
    out
        Folder for the new model.
    """
    from offramp.commands.specialise import specialise as run_specialise
    from offramp.report.tune import specialise_table, specialise_verdict

    use(device, threads)
    found = run_specialise(
        open_for(model, base=base, device=device, dtype=None),
        corpus,
        out,
        replace(specialising or SpecialiseConfig(), missing_kv="propagate"),
        on_stage=say,
    )
    shown = output()
    shown.print(specialise_table(found, width=shown.width))
    say_verdict(specialise_verdict(found))
    say(
        f"{quote(str(out))} holds the model. Measure it on other text with: "
        f"offramp confidence {quote(str(out))} --corpus OTHER"
    )
