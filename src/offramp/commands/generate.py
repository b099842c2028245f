"""Text from an opened model: ``offramp generate``."""

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from offramp.calibration.certificate import Certificate
from offramp.calibration.thresholds import StoredThresholds, load_thresholds
from offramp.commands.audit import AuditLog, check_audited
from offramp.commands.chat_template import chat_ids
from offramp.data.tokenizer import encode_prompt
from offramp.errors import CertificateError
from offramp.exits.policy import ThresholdPolicy
from offramp.generation.config import GenerateConfig
from offramp.generation.exit_rule import ExitRule
from offramp.generation.generate import Generation
from offramp.generation.generate import generate as generate_ids
from offramp.models.base import EarlyExitModel
from offramp.models.missing_kv import complete
from offramp.models.open import OpenedModel
from offramp.options import config_of, refuse_given


def generate(
    opened: OpenedModel,
    prompt: str,
    config: GenerateConfig,
    *,
    chat: bool = False,
    audit: AuditLog | None = None,
) -> Generation:
    """Begin a text; its tokens come as the result is iterated.

    The prompt begins with the model's first tokens, such as BOS. ``chat`` puts it into the
    model's chat template instead. The text also ends at the model's end tokens. ``audit`` runs a
    share of the tokens that exit to the end, too, and records what it finds; if it keeps a
    promise, it chooses how boldly tokens exit. Raises ConfigError if no exit can be trusted to.
    """
    if audit is not None:
        check_audited(opened, config, audit)
    ids, config = begin(opened, prompt, config, chat=chat)
    return generate_ids(
        opened.model,
        ids,
        config,
        tokenizer=opened.tokenizer,
        fitted=opened.fitted,
        auditor=None if audit is None else audit.auditor(seed=config.seed),
    )


def begin(
    opened: OpenedModel, prompt: str, config: GenerateConfig, *, chat: bool
) -> tuple[list[int], GenerateConfig]:
    """Return the token ids of a prompt, and the config with the model's end tokens."""
    ids = chat_ids(opened, prompt) if chat else prompt_ids(opened, prompt)
    return ids, with_end_tokens(opened, config)


def with_end_tokens(opened: OpenedModel, config: GenerateConfig) -> GenerateConfig:
    """Return the config with the model's end tokens among the tokens that end a text."""
    stops = dict.fromkeys((*config.stop_tokens, *opened.end_tokens))
    return replace(config, stop_tokens=tuple(stops))


def prompt_ids(opened: OpenedModel, prompt: str) -> list[int]:
    """Token ids of a prompt, which begins with the model's first tokens once."""
    ids = encode_prompt(opened.tokenizer, prompt, special_tokens=False)
    first = list(opened.first_tokens)
    return ids if ids[: len(first)] == first else first + ids


def config_for(
    opened: OpenedModel, threshold: Any = None, certificate: Any = None, **options: Any
) -> GenerateConfig:
    """Return the config of Python's arguments; ``certificate`` is one, or the file of one."""
    config = config_of(GenerateConfig, {**options, "threshold": threshold})
    if certificate is None:
        return config
    refuse_given("with a certificate, which has its own", threshold=threshold)
    refuse_given("with a certificate, which names it", confidence=options.get("confidence"))
    refuse_given("with a certificate, whose thresholds hold", decay=options.get("decay"))
    stored, kv = stored_for(opened, certificate), options.get("missing_kv")
    return with_thresholds(config, stored, missing_kv=kv, model=opened.model)


def stored_for(opened: OpenedModel, certificate: Certificate | str | Path) -> StoredThresholds:
    """Return the thresholds of a certificate. Raises CertificateError for another model's."""
    stored = (
        StoredThresholds.of(certificate)
        if isinstance(certificate, Certificate)
        else load_thresholds(Path(certificate))
    )
    stored.require_model(opened.sha256, weights=opened.weights)
    stored.require_bos(bool(opened.first_tokens))
    stored.warn_of_dtype(opened.precision)
    return stored


def confidence_note(opened: OpenedModel, rule: ExitRule | None) -> str:
    """Return a sentence on the confidence that decides, where the user named none."""
    assert rule is not None
    assert isinstance(rule.policy, ThresholdPolicy)
    if rule.confidence == "gain":
        nats = ", ".join(
            f"{max(0.0, -bound):.3g}" for bound in dict.fromkeys(rule.policy.thresholds)
        )
        return (
            "Exits are decided by gain: a token leaves where leaving is expected to cost at most "
            f"{nats} nats. For another measure: --confidence max_prob"
        )
    if rule.policy.decay:
        return "Exits are decided by max_prob, as always with --decay."
    return (
        "Exits are decided by max_prob, which needs an LM head at each exit. A gate is cheaper: "
        f"offramp confidence {quote(opened.name)} --corpus TEXT --fit TRAINING_TEXT"
    )


def with_thresholds(
    config: GenerateConfig,
    stored: StoredThresholds,
    *,
    missing_kv: str | None,
    model: EarlyExitModel,
) -> GenerateConfig:
    """The config with the thresholds of a file; refused under another ``missing_kv``.

    ``missing_kv`` is what the user chose, or None. It makes no difference if all exits that the
    thresholds use are complete.
    """
    exits = model.exit_layers
    same = complete(model, ThresholdPolicy.of(stored.thresholds, len(exits)).used(exits))
    if not same and stored.sha256 is not None and missing_kv not in (None, stored.missing_kv):
        raise CertificateError(
            f"missing_kv: expected {stored.missing_kv}, under which the certificate's guarantee "
            f"was made, got {missing_kv}"
        )
    kept: Any = missing_kv or stored.missing_kv
    return replace(
        config,
        threshold=stored.thresholds,
        confidence=stored.confidence,
        missing_kv=kept,
    )
