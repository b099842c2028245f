"""offramp probe."""

from offramp.cli.base import (
    Base,
    Bos,
    Device,
    Dtype,
    Exits,
    Model,
    Out,
    Text,
    Threads,
    Weights,
    check_out_file,
    open_for,
    output,
    say_verdict,
    token_bar,
    use,
    warn,
)
from offramp.files import write_json


def probe(
    model: Model,
    *,
    corpus: Text = "python-docs",
    tokens: int | None = None,
    out: Out = None,
    base: Base = None,
    exits: Exits = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
    weights: Weights = None,
) -> None:
    """Measure how much each exit knows and costs, and predict whether exits will pay.

    A plain checkpoint is given exits at each quarter of its depth.

    Parameters
    ----------
    tokens
        Read only this many tokens, from the start.
    """
    check_out_file(out)

    from offramp.commands.probe import probe as run_probe
    from offramp.report.probe import probe_table

    use(device, threads)
    opened = open_for(
        model, base=base, exits=exits, bos=bos, device=device, dtype=dtype, weights=weights
    )
    with token_bar("probe") as on_tokens:
        content = run_probe(opened, corpus, tokens=tokens, on_tokens=on_tokens)
    shown = output()
    shown.print(probe_table(content, width=shown.width))
    say_verdict(content["verdict"])
    warn(model, corpus, {**content, "untrained": False})
    if out:
        write_json(out, content)
