"""offramp evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from offramp.calibration.thresholds import StoredThresholds, load_thresholds
from offramp.cli.base import (
    UNTRAINED,
    Base,
    Bos,
    Device,
    Exits,
    Model,
    Out,
    Precision,
    Threads,
    Weights,
    check_out_file,
    console,
    open_for,
    output,
    say,
    say_verdict,
    use,
)
from offramp.cli.decoding import KeysValues, Measure, Thresholds, parse_threshold
from offramp.cli.sweep import parse_thresholds
from offramp.commands.evaluate.config import EvaluateConfig
from offramp.errors import ConfigError
from offramp.files import write_json
from offramp.generation.config import GenerateConfig

if TYPE_CHECKING:
    from offramp.models.open import OpenedModel


def evaluate(
    model: Model,
    config: Annotated[EvaluateConfig, Parameter(name="*")],
    *,
    thresholds: Thresholds = None,
    several: Annotated[
        str | None,
        Parameter(
            name="--thresholds",
            allow_leading_hyphen=True,
            help="With --compare: thresholds between commas (default: 0.5,0.7,0.9 for measures "
            "from 0 to 1).",
        ),
    ] = None,
    certificate: Path | None = None,
    measure: Measure = None,
    keys_values: KeysValues = None,
    out: Out = None,
    base: Base = None,
    exit_layers: Exits = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Precision | None = None,
    weights: Weights = None,
) -> None:
    """Run tasks of lm-evaluation-harness with exits on.

    A context runs at full depth, as a prompt does in decoding. The tokens that are scored or
    generated after it exit.

    Parameters
    ----------
    certificate
        Take the thresholds in a file that ``offramp calibrate`` wrote for this model.
    dtype
        Precision of the model (default: that of the certificate, or of the model's files).
    """
    given = {"threshold": thresholds, "thresholds": several, "confidence": measure}
    for name, value in given.items():
        if certificate is not None and value is not None:
            raise ConfigError(f"{name}: expected none with --certificate, which has its own")
    exits = GenerateConfig(
        threshold=None if thresholds is None else parse_threshold(thresholds),
        confidence=measure,
        missing_kv=keys_values or "propagate",
    )
    chosen = None if several is None else parse_thresholds(several)
    check_out_file(out)
    stored = None if certificate is None else load_thresholds(certificate)

    from offramp.commands.evaluate.run import check_thresholds
    from offramp.commands.evaluate.run import evaluate as run_evaluate
    from offramp.commands.evaluate.tasks import load_tasks
    from offramp.report.progress import bars

    check_thresholds(config, exits, chosen)
    use(device, threads)
    tasks = load_tasks(config)
    opened = open_for(
        model,
        base=base,
        exits=exit_layers,
        bos=bos,
        device=device,
        dtype=dtype,
        weights=weights,
        stored=stored,
    )
    if stored is not None:
        exits = _certified(exits, stored, opened, keys_values)
    with bars(console) as drawn:
        content = run_evaluate(
            opened,
            tasks,
            config,
            exits,
            thresholds=chosen,
            on_progress=lambda done, total, text: drawn.show(
                "evaluate", done=done, total=total, text=text
            ),
        )
    if out:
        write_json(out, content)
    _show(content, opened)


def _certified(
    exits: GenerateConfig,
    stored: StoredThresholds,
    opened: "OpenedModel",
    keys_values: str | None,
) -> GenerateConfig:
    from offramp.commands.generate import with_thresholds

    return with_thresholds(exits, stored, missing_kv=keys_values, model=opened.model)


def _show(content: dict[str, Any], opened: "OpenedModel") -> None:
    """Print the tables and the verdict, and say what was left out."""
    from offramp.report.evaluate import evaluation_tables, evaluation_verdict

    shown = output()
    for table in evaluation_tables(content, width=shown.width):
        shown.print(table)
    if verdict := evaluation_verdict(content):
        say_verdict(verdict)
    used = any(row["threshold"] is not None for row in content["evaluations"])
    if content["untrained"] and used:
        say(f"{opened.name}: {UNTRAINED}.")
