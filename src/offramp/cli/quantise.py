"""offramp quantise."""

from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from offramp.cli.base import Base, Model, Threads, say, use
from offramp.models.native.schemes import Scheme, in_words


def quantise(
    model: Model,
    *,
    weights: Annotated[Scheme, Parameter(help="int8 or int4.")],
    out: Path,
    base: Base = None,
    threads: Threads = None,
) -> None:
    """Write a model with weights of 8 or 4 bits, which decodes faster and needs less memory.

    The weights of attention, MLP and LM heads are quantised, those of exits' own heads too. LM
    heads have at least 8 bits. Embedding, norms, adapters and gates stay as they are. Every command
    that reads a model opens the folder. It is no Hugging Face checkpoint: only offramp reads it.

    Parameters
    ----------
    out
        Folder for the model.
    """
    from offramp.commands.quantise import quantise as run_quantise

    use("cpu", threads)
    sizes = run_quantise(model, weights, out, base=base)
    say(
        f"{quote(str(out))} holds the model with {in_words(weights)}: "
        f"{sizes.after / 1e6:,.1f} MB of weights, {sizes.before / 1e6:,.1f} MB before. "
        f"Next: offramp generate {quote(str(out))} PROMPT"
    )
