"""offramp confidence."""

from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from offramp.cli.base import (
    Base,
    Bos,
    Device,
    Dtype,
    Exits,
    Model,
    Text,
    Threads,
    Weights,
    check_out_file,
    console,
    open_for,
    output,
    say,
    say_verdict,
    token_bar,
    use,
    warn,
)
from offramp.errors import ConfigError
from offramp.exits.confidence_names import check_confidence
from offramp.files import write_json


def confidence(
    model: Model,
    *,
    corpus: Text,
    measures: tuple[str, ...] = (),
    fit: str | None = None,
    out: Annotated[
        Path | None, Parameter(help="Also write the figures to this JSON file, and a plot as .png.")
    ] = None,
    base: Base = None,
    exits: Exits = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
    weights: Weights = None,
) -> None:
    """Compare the confidence measures: risk and coverage, AUROC, ECE, and PPL at equal cost.

    Parameters
    ----------
    measures
        Such as max_prob,entropy,gain (default: all that the model can use).
    fit
        First fit gates and temperatures to this text, which should be training text, and keep
        them in the model's folder.
    """
    check_out_file(out)
    for name in measures:
        check_confidence(name)
    if fit is not None and weights is not None:
        raise ConfigError(
            f"weights: expected none with --fit, whose gates stay in the model's folder, got "
            f"{weights}; fit them in a folder that offramp quantise wrote"
        )

    from offramp.commands.confidence import fit as fit_exits
    from offramp.commands.confidence import measure_confidence
    from offramp.report.confidence import (
        confidence_table,
        confidence_verdict,
        frontier_table,
        save_confidence_png,
    )
    from offramp.report.progress import bars

    use(device, threads)
    opened = open_for(
        model,
        base=base,
        exits=exits,
        bos=bos,
        device=device,
        dtype="float32" if fit else dtype,
        weights=weights,
    )
    if fit is not None:
        say(f"Fitting gates and temperatures to {fit}; this can take minutes")
        with bars(console) as drawn:
            show = partial(drawn.show, "fit", text="gates")
            opened = fit_exits(opened, fit, on_gate=lambda done, of: show(done=done, total=of))
        say(f"Stored gates and temperatures in {quote(str(model))}")
    with token_bar("trace") as on_tokens:
        content = measure_confidence(opened, corpus, measures=measures, on_tokens=on_tokens)
    shown = output()
    shown.print(confidence_table(content, width=shown.width))
    shown.print(frontier_table(content, width=shown.width))
    say_verdict(confidence_verdict(content))
    warn(model, corpus, content)
    if out:
        write_json(out, content)
        if out.is_file():  # no device
            save_confidence_png(content, out.with_suffix(".png"))
