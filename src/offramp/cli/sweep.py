"""offramp sweep."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from offramp.calibration.thresholds import load_thresholds
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
    open_for,
    output,
    say_verdict,
    token_bar,
    use,
    warn,
)
from offramp.errors import ConfigError
from offramp.exits.confidence_names import check_confidence
from offramp.files import write_json

if TYPE_CHECKING:
    from offramp.evaluation.sweep import Threshold


def sweep(
    model: Model,
    *,
    corpus: Text,
    thresholds: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    confidence: str | None = None,
    certificate: Path | None = None,
    out: Path | None = None,
    base: Base = None,
    exits: Exits = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
    weights: Weights = None,
) -> None:
    """Measure PPL, Compute% and FLOPs% of any number of thresholds, from one pass over a text.

    Parameters
    ----------
    thresholds
        Numbers between commas; one for each exit but the last is written 0.9:0.8
        (default: 0.5,0.7,0.8,0.9,0.95,0.99 for measures from 0 to 1).
    confidence
        The measure of the thresholds: max_prob, margin, entropy, saturation, patience, gate
        or gain (default: gain where it was fitted, else max_prob). Without it, a threshold
        from 0 to 1 on gain is the share of the last layer's probability that an exit must keep.
    certificate
        Instead: the thresholds in a file that ``offramp calibrate`` wrote for this model.
    out
        Also write the table to this file: CSV if its name ends in .csv, else JSON.
    """
    for name, value in (("thresholds", thresholds), ("confidence", confidence)):
        if certificate is not None and value is not None:
            raise ConfigError(f"{name}: expected none with --certificate, which has its own")
    if confidence is not None:
        check_confidence(confidence)
    parsed = None if thresholds is None else parse_thresholds(thresholds)
    check_out_file(out)
    stored = None if certificate is None else load_thresholds(certificate)

    from offramp.commands.sweep import sweep as run_sweep
    from offramp.report.sweep import sweep_table, sweep_verdict

    use(device, threads)
    opened = open_for(
        model,
        base=base,
        exits=exits,
        bos=bos,
        device=device,
        dtype=dtype,
        weights=weights,
        stored=stored,
    )
    with token_bar("trace") as on_tokens:
        content = run_sweep(
            opened, corpus, parsed, confidence=confidence, stored=stored, on_tokens=on_tokens
        )
    shown = output()
    shown.print(sweep_table(content, width=shown.width))
    say_verdict(sweep_verdict(content))
    if out:
        _write(out, content)
    warn(model, corpus, content)


def _write(out: Path, content: dict[str, Any]) -> None:
    from offramp.report.result import write_csv

    if out.suffix == ".csv":
        write_csv(out, content["rows"])
    else:
        write_json(out, content)


def parse_thresholds(text: str) -> list["Threshold"]:
    """Thresholds from their written form; 0.9:0.8 is one for each exit but the last."""
    try:
        numbers = [[float(number) for number in part.split(":")] for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"thresholds: expected numbers between commas, such as 0.8,0.95, got {text!r}"
        ) from None
    return [tuple(part) if len(part) > 1 else part[0] for part in numbers]
