"""offramp probe."""

from pathlib import Path

from rich.text import Text

from offramp.cli.base import (
    Device,
    Dtype,
    Threads,
    check_out_file,
    console,
    open_for,
    output,
    use,
)
from offramp.cli.confidence import warn
from offramp.files import write_json


def probe(
    model: Path,
    *,
    corpus: str = "python-docs",
    tokens: int | None = None,
    out: Path | None = None,
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
) -> None:
    """Say how much each exit knows, what asking it costs, and whether exits will pay.

    Parameters
    ----------
    model
        A folder that ``offramp train`` or ``offramp tune`` wrote, a Hugging Face checkpoint (a
        folder, or a name on the hub; exits at each quarter of its depth), or smollm2-135m.
    corpus
        The text: pangram, python-docs, hf:DATASET, or a text file or folder. It is read
        whole, or its test split where it has named ones.
    tokens
        Read only this many tokens, from the start.
    out
        Write the figures to this JSON file, too.
    dtype
        Precision of the model.
    """
    from offramp.commands.probe import probe as run_probe
    from offramp.report.probe import probe_table
    from offramp.report.progress import bars

    use(device, threads)
    check_out_file(out)
    with bars(console) as drawn:
        content = run_probe(
            open_for(model, device=device, dtype=dtype),
            corpus,
            tokens=tokens,
            on_tokens=lambda done, total: drawn.show(
                "probe", done=done, total=total, text="tokens"
            ),
        )
    output().print(probe_table(content))
    output().print(Text(content["verdict"]), soft_wrap=True)
    warn(model, corpus, {**content, "untrained": False})
    if out:
        write_json(out, content)
