"""offramp sweep."""

from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from offramp.cli.base import (
    Device,
    Dtype,
    Threads,
    app,
    check_out_file,
    console,
    output,
    say,
    use,
)
from offramp.cli.confidence import warn
from offramp.commands.calibrate import sweep_certificate
from offramp.commands.sweep import sweep_folder
from offramp.errors import ConfigError
from offramp.evaluation.sweep import Threshold
from offramp.files import write_json
from offramp.report.progress import bars
from offramp.report.sweep import sweep_table

DEFAULT_THRESHOLDS = "0.5,0.7,0.8,0.9,0.95,0.99"


@app.command
def sweep(
    model_dir: Path,
    *,
    corpus: str,
    thresholds: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    certificate: Path | None = None,
    out: Path | None = None,
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
) -> None:
    """PPL, Shallow% and Compute% of any number of thresholds, from one pass over a text.

    Parameters
    ----------
    model_dir
        A folder that ``offramp train`` wrote, a Hugging Face checkpoint (a folder, or a name on
        the hub), one with exits, or smollm2-135m.
    corpus
        The text: pangram, python-docs, hf:DATASET, or a text file or folder. It is read
        whole, or its test split where it has named ones.
    thresholds
        Numbers between commas; one for each exit but the last is written 0.9:0.8
        (default: 0.5,0.7,0.8,0.9,0.95,0.99).
    certificate
        Instead: the thresholds of a certificate that ``offramp calibrate`` wrote for this model.
    out
        Write the table to this JSON file, too.
    dtype
        Precision of the model.
    """
    use(device, threads)
    if certificate is not None and thresholds is not None:
        raise ConfigError("thresholds: expected none with --certificate, which has its own")
    parsed = parse_thresholds(thresholds or DEFAULT_THRESHOLDS)
    check_out_file(out)
    with bars(console) as drawn:
        common: dict[str, Any] = {
            "device": device,
            "dtype": getattr(torch, dtype),
            "on_tokens": lambda done, total: drawn.show(
                "trace", done=done, total=total, text="tokens"
            ),
        }
        if certificate is not None:
            content = sweep_certificate(model_dir, corpus, certificate, **common)
        else:
            result = sweep_folder(model_dir, corpus, parsed, **common)
            content = result.content
    output().print(sweep_table(content))
    if out:
        write_json(out, content)
    if certificate is not None:
        warn(model_dir, corpus, content)
        return
    if result.unfinished:
        say(f"{model_dir}: its run is unfinished; this is its best model so far.")
    if result.untrained:
        say(f"{model_dir}: its exits were never trained.")
    if result.unknown_tokens:
        say(
            f"{result.unknown_tokens:,} of the tokens are <unk>: characters that the training "
            "text does not have."
        )


def parse_thresholds(text: str) -> list[Threshold]:
    """Thresholds from their written form; 0.9:0.8 is one for each exit but the last."""
    try:
        numbers = [[float(number) for number in part.split(":")] for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"thresholds: expected numbers between commas, such as 0.8,0.95, got {text!r}"
        ) from None
    return [tuple(part) if len(part) > 1 else part[0] for part in numbers]
