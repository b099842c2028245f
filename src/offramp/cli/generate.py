"""offramp generate."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from offramp.calibration.share import check_keep_promise
from offramp.calibration.thresholds import load_thresholds
from offramp.cli.base import (
    Base,
    Bos,
    Device,
    Exits,
    Model,
    Precision,
    Threads,
    Weights,
    check_out_file,
    open_for,
    output,
    say,
    use,
)
from offramp.cli.decoding import (
    ConfigFlags,
    Decay,
    KeysValues,
    Measure,
    Thresholds,
    for_model,
    say_about_exits,
    say_legend,
    say_summary,
    show_tokens,
    timed,
    uses_exits,
    with_flags,
)
from offramp.cli.plain_text import standard_input, write_text
from offramp.cli.streams import utf8
from offramp.errors import ConfigError
from offramp.files import write_json
from offramp.generation.config import GenerateConfig

if TYPE_CHECKING:
    from offramp.commands.audit import AuditLog
    from offramp.generation.generate import Generation
    from offramp.models.open import OpenedModel

FULL_DEPTH = GenerateConfig()


def generate(
    model: Model,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    config: Annotated[GenerateConfig, ConfigFlags] = FULL_DEPTH,
    *,
    thresholds: Thresholds = None,
    falling: Decay = None,
    certificate: Path | None = None,
    measure: Measure = None,
    keys_values: KeysValues = None,
    stop: list[str] | None = None,
    stop_token: list[str] | None = None,
    chat: bool = False,
    audit: float | None = None,
    audit_log: Path | None = None,
    keep_promise: float | None = None,
    promise_risk: Literal["disagreement", "nll-gap"] = "disagreement",
    json_: Annotated[bool, Parameter(name="--json")] = False,
    base: Base = None,
    exits: Exits = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Precision | None = None,
    weights: Weights = None,
) -> None:
    """Continue a text; in a terminal each token has the colour of its exit.

    Parameters
    ----------
    prompt
        The text to continue; - reads it from standard input.
    certificate
        Take the thresholds in a file that ``offramp calibrate`` wrote for this model.
    stop
        A string that ends the text; give the flag again for another.
    stop_token
        A token that ends the text: its id, such as 2, or its text, such as "\\n" or "<|im_end|>"
        (text:2 is the digit 2); give the flag again for another.
    chat
        Put the prompt into the model's chat template.
    audit
        The share of the tokens that exit early which are also run to the end, such as 0.02. It
        changes no text; at the end it says how often the last layer predicts another token, with
        a bound that holds at all times.
    audit_log
        With --audit: keep what the audit found in this JSON file; if it exists, the audit in it
        goes on.
    keep_promise
        With --audit: keep the mean risk of all new tokens at or below this number, such as 0.05,
        at all times. Exits become careful as the audit's bound nears it, and never bolder than
        the thresholds. The first few thousand tokens run through nearly all layers; --audit-log
        goes on from them.
    promise_risk
        The risk that is promised: disagreement is the share of tokens for which the last layer
        predicts another one; nll-gap is the loss in nats per token, clipped to 1.
    json_
        Print one JSON object at the end instead of the text as it comes.
    dtype
        Precision of the model (default: that of the certificate, or of the model's files).
    """
    stored = None if certificate is None else load_thresholds(certificate)
    config = with_flags(
        config,
        stored,
        thresholds=thresholds,
        decay=falling,
        confidence=measure,
        missing_kv=keys_values,
        stop=stop,
    )
    log = _audit_log(audit, audit_log, config, keep_promise=keep_promise, risk=promise_risk)
    text = standard_input() if prompt == "-" else utf8(prompt) or ""
    use(device, threads)
    opened = open_for(
        model,
        base=base,
        exits=exits,
        drafting=config,
        bos=bos,
        device=device,
        dtype=dtype,
        weights=weights,
        stored=stored,
    )
    config = for_model(config, opened, stored, missing_kv=keys_values, stop_token=stop_token)
    before = 0 if log is None else log.promised.tokens
    try:
        _run(opened, config, prompt=text, chat=chat, as_json=json_, audit=log)
    finally:  # a text that was interrupted has tokens that left, too
        if log is not None and audit_log is not None and log.promised.tokens > before:
            write_json(audit_log, log.state())
    if log is not None:
        say(log.sentence())


def _audit_log(
    share: float | None,
    path: Path | None,
    config: GenerateConfig,
    *,
    keep_promise: float | None,
    risk: str,
) -> "AuditLog | None":
    check_keep_promise(keep_promise, risk, share=share)
    if share is None:
        if path is not None:
            raise ConfigError("audit_log: expected --audit with it, got none")
        return None
    if config.threshold is None:
        raise ConfigError("audit: expected a threshold or a certificate, without which none exits")
    check_out_file(path)
    from offramp.commands.audit import open_log

    return open_log(share, path, keep_promise=keep_promise, promise_risk=risk)


def _run(
    opened: "OpenedModel",
    config: GenerateConfig,
    *,
    prompt: str,
    chat: bool,
    as_json: bool,
    audit: "AuditLog | None",
) -> None:
    from offramp.commands.generate import confidence_note, generate

    generation = generate(opened, prompt, config, chat=chat, audit=audit)
    say_about_exits(config, opened)
    if audit is not None and audit.keep_promise is not None:
        say(audit.promise_note())
    if config.threshold is not None and config.confidence is None:
        say(confidence_note(opened, generation.rule))
    if as_json:
        _, rate = timed(generation, show=None)
        found = {} if audit is None else {"audit": audit.content()}
        print(json.dumps(_content(generation, rate) | found))
        return
    shown = output()
    write_text(shown, f"{prompt}\n" if chat else prompt, "dim")
    seconds, rate = timed(generation, show=show_tokens(shown, opened))
    write_text(shown, "\n")
    if uses_exits(config):
        say_legend(shown, opened)
    say_summary(generation, opened, rate=rate, prefill=seconds)


def _content(generation: "Generation", rate: float | None) -> dict[str, Any]:
    completion = generation.completion
    return {
        "text": completion.text,
        "tokens": [
            {"id": token.id, "exit_layer": token.exit_layer, "confidence": token.confidence}
            for token in completion.tokens
        ],
        "tokens_per_s": rate,
        "mean_layers": generation.mean_layers,
        "missing_kv": generation.missing_kv,
        "confidence": None if generation.rule is None else generation.rule.confidence,
        "acceptance_rate": generation.acceptance_rate,
        "lossless": generation.lossless,
    }
