"""offramp calibrate --on generation."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.calibration.certificate import Certificate
from offramp.calibration.promise import Promise
from offramp.cli.base import output, say, say_verdict, token_bar, warn
from offramp.commands.on_generation.config import Prompts, WriteConfig
from offramp.errors import ConfigError
from offramp.files import write_json

if TYPE_CHECKING:
    from offramp.models.open import OpenedModel


def check_source(
    corpus: str | None, prompts: Path | None, texts: WriteConfig | None, *, written: bool
) -> None:
    """Raise a ConfigError unless there is one text, or one source of prompts."""
    if not written:
        if corpus is None:
            raise ConfigError("corpus: expected the text to calibrate on, got none")
        if prompts is not None or texts is not None:
            name = "prompts" if prompts is not None else "options of new texts"
            raise ConfigError(f"{name}: expected none without --on generation")
    elif (corpus is None) == (prompts is None):
        got = "none" if corpus is None else "both"
        raise ConfigError(f"prompts: expected --prompts FILE or --corpus TEXT, got {got}")


def run_on_generation(
    opened: "OpenedModel",
    source: str | Path,
    promise: Promise,
    config: WriteConfig,
    checked: Certificate | None,
    *,
    measure: str | None,
    out: Path | None,
) -> None:
    """Certify or check thresholds on texts that continue prompts, print what was found, write it.

    A path in ``source`` is a file of prompts, a string the name of a corpus.
    """
    from offramp.commands.on_generation.writer import prompts_of_file, prompts_of_text

    read = (
        prompts_of_file(opened, source, config)
        if isinstance(source, Path)
        else prompts_of_text(opened, source, config)
    )
    if checked is not None:
        content = _check(opened, read, checked, config, promise)
    else:
        content = _certify(opened, read, promise, config, measure)
    warn(Path(opened.name), str(source), {"untrained": not opened.exits_trained})
    if out:
        write_json(out, content)


def _certify(
    opened: "OpenedModel",
    prompts: Prompts,
    promise: Promise,
    config: WriteConfig,
    measure: str | None,
) -> dict[str, Any]:
    from offramp.commands.on_generation.certify import certify_generation
    from offramp.exits.default_confidence import default_confidence
    from offramp.report.confidence import certificate_table, certificate_verdict

    confidence = measure or default_confidence(opened.fitted, opened.model.exit_layers)
    with token_bar("texts", unit="texts") as on_prompt:
        certificate, steps, full = certify_generation(
            opened, prompts, promise, config, confidence=confidence, on_prompt=on_prompt
        )
    content = certificate.content()
    shown = output()
    shown.print(_steps_table([asdict(step) for step in steps], promise, full.tokens_per_s))
    shown.print(certificate_table(content))
    say_verdict(certificate_verdict(content))
    if certificate.is_full_model:
        say(
            "No threshold of the path keeps the promise on these prompts; the certificate is for "
            "the full model."
        )
    return content


def _steps_table(steps: Sequence[dict[str, Any]], promise: Promise, full: float) -> Any:
    from rich.table import Table

    from offramp.report.text import threshold_text

    table = Table(caption=f"tokens/s: prompts included; at full depth {full:.1f}")
    for name in ("thresholds", promise.risk, "p-value", "mean layers", "tokens/s"):
        table.add_column(name, justify="left" if name == "thresholds" else "right")
    for step in steps:
        thresholds = dict.fromkeys(map(threshold_text, step["thresholds"]))
        table.add_row(
            ", ".join(thresholds),
            f"{step['loss']:.4f}",
            "-" if step["p_value"] is None else f"{step['p_value']:.3g}",
            f"{step['mean_layers']:.2f}",
            f"{step['tokens_per_s']:.1f}",
        )
    return table


def _check(
    opened: "OpenedModel",
    prompts: Prompts,
    certificate: Certificate,
    config: WriteConfig,
    promise: Promise,
) -> dict[str, Any]:
    from offramp.commands.on_generation.certify import check_generation
    from offramp.report.confidence import drift_sentence

    with token_bar("texts", unit="texts") as on_prompt:
        content = check_generation(
            opened, prompts, certificate, config, level=promise.delta, on_prompt=on_prompt
        )
    say_verdict(drift_sentence(content))
    if content["same_corpus"]:
        say("These prompts are those of the certificate, so the check says nothing about new ones.")
    return content
