"""offramp export."""

from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from offramp.cli.base import Base, say
from offramp.cli.interrupts import work_begins


def export(
    model_dir: str,
    *,
    exit_layer: Annotated[int, Parameter(name="--exit")],
    out: Path,
    base: Base = None,
) -> None:
    """Write the first layers of a model and their exit as a plain Hugging Face checkpoint.

    Parameters
    ----------
    model_dir
        A folder that ``offramp train`` or ``offramp tune`` wrote, or a Hugging Face checkpoint
        (its exits use its final norm and LM head).
    exit_layer
        The exit: the number of layers to keep. Its head must be shared, norm or full.
    out
        Folder for the checkpoint.
    """
    from offramp.commands.export import export_exit

    work_begins()
    export_exit(model_dir, exit_layer, out, base=base)
    say(
        f"{quote(str(out))} holds the first {exit_layer} layers, which AutoModelForCausalLM can "
        "load."
    )
