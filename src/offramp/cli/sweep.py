"""offramp sweep."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from offramp.calibration.thresholds import load_thresholds
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
from offramp.errors import ConfigError
from offramp.files import write_json

if TYPE_CHECKING:
    from offramp.evaluation.sweep import Threshold


def sweep(
    model_dir: Path,
    *,
    corpus: str,
    thresholds: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    confidence: str | None = None,
    certificate: Path | None = None,
    out: Path | None = None,
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
) -> None:
    """PPL, Compute% and FLOPs% of any number of thresholds, from one pass over a text.

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
        (default: 0.5,0.7,0.8,0.9,0.95,0.99 for measures from 0 to 1).
    confidence
        The measure that the thresholds are of: max_prob (default), margin, entropy, saturation,
        patience, gate or gain.
    certificate
        Instead: the thresholds in a file that ``offramp calibrate`` wrote for this model.
    out
        Write the table to this file, too: CSV if its name ends in .csv, else JSON.
    dtype
        Precision of the model.
    """
    if certificate is not None and (thresholds is not None or confidence is not None):
        name = "thresholds" if thresholds is not None else "confidence"
        raise ConfigError(f"{name}: expected none with --certificate, which has its own")
    parsed = None if thresholds is None else parse_thresholds(thresholds)
    check_out_file(out)
    stored = None if certificate is None else load_thresholds(certificate)

    from offramp.commands.sweep import sweep as run_sweep
    from offramp.report.progress import bars
    from offramp.report.result import write_csv
    from offramp.report.sweep import sweep_table, sweep_verdict

    use(device, threads)
    opened = open_for(model_dir, device=device, dtype=dtype, stored=stored)
    with bars(console) as drawn:
        content = run_sweep(
            opened,
            corpus,
            parsed,
            confidence=confidence or "max_prob",
            stored=stored,
            on_tokens=lambda done, total: drawn.show(
                "trace", done=done, total=total, text="tokens"
            ),
        )
    shown = output()
    shown.print(sweep_table(content, width=shown.width))
    shown.print(sweep_verdict(content), highlight=False, markup=False, soft_wrap=True)
    if out and out.suffix == ".csv":
        write_csv(out, content["rows"])
    elif out:
        write_json(out, content)
    warn(model_dir, corpus, content)


def parse_thresholds(text: str) -> list["Threshold"]:
    """Thresholds from their written form; 0.9:0.8 is one for each exit but the last."""
    try:
        numbers = [[float(number) for number in part.split(":")] for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"thresholds: expected numbers between commas, such as 0.8,0.95, got {text!r}"
        ) from None
    return [tuple(part) if len(part) > 1 else part[0] for part in numbers]
