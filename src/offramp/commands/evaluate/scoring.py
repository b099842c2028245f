"""How the requests of tasks are run: the model, its exits and the sizes, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.calibration.certificate import Certificate
from offramp.calibration.thresholds import StoredThresholds, load_thresholds
from offramp.commands.generate import with_thresholds
from offramp.errors import ConfigError
from offramp.generation.config import GenerateConfig
from offramp.generation.exit_rule import ExitRule
from offramp.generation.options import exit_rule, missing_kv_for
from offramp.models.base import EarlyExitModel
from offramp.models.first_layers import FirstLayers
from offramp.models.missing_kv import MissingKV
from offramp.models.open import OpenedModel
from offramp.options import config_of


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A model and where its tokens leave. ``scoring_of`` makes it."""

    opened: OpenedModel
    "The model's tokenizer, gates and files."
    model: EarlyExitModel
    "What runs: the model, or its first layers alone."
    config: GenerateConfig
    "Threshold, confidence and ``missing_kv``; the tasks choose the rest."
    rule: ExitRule | None
    "What decides where tokens leave; None for full depth."
    missing_kv: MissingKV
    meaning: str | None = None
    "What figures state as ``missing_kv``: exact if all exits are complete; None for full depth."
    batch_size: int = 8
    max_length: int
    prefix: int | None = None
    "The token before a text without a context; None if the model has none."


def exits_for(
    opened: OpenedModel, certificate: Certificate | str | Path | None, chosen: Mapping[str, Any]
) -> GenerateConfig:
    """Return where tokens leave, from ``threshold``, ``confidence`` and ``missing_kv`` by name.

    A certificate, or a file of ``offramp calibrate``, has the first two itself. Raises ConfigError
    for options out of range, and CertificateError for the certificate of another model.
    """
    config = config_of(
        GenerateConfig, {name: value for name, value in chosen.items() if value is not None}
    )
    if certificate is None:
        return config
    for name in ("threshold", "confidence"):
        if chosen.get(name) is not None:
            raise ConfigError(f"{name}: expected none with a certificate, which has its own")
    stored = (
        StoredThresholds.of(certificate)
        if isinstance(certificate, Certificate)
        else load_thresholds(Path(certificate))
    )
    stored.require_model(opened.sha256, weights=opened.weights)
    stored.require_bos(bool(opened.first_tokens))
    stored.warn_of_dtype(opened.precision)
    kept = chosen.get("missing_kv")
    return with_thresholds(config, stored, missing_kv=kept, model=opened.model)


def scoring_of(
    opened: OpenedModel,
    config: GenerateConfig,
    *,
    batch_size: int,
    max_length: int | None,
    prefix: int | None,
    static: int | None = None,
) -> Scoring:
    """Check the options against the model; a ConfigError for those that it does not support.

    ``static`` is an exit: then the layers up to it run as a model of their own, which says what
    ``offramp export`` writes.
    """
    model = opened.model if static is None else FirstLayers(opened.model, static)
    rule = exit_rule(model, config, policy=None, fitted=opened.fitted)
    way, meaning = missing_kv_for(model, config, rule)
    longest = model.max_length
    if max_length is not None and not 2 <= max_length <= longest:
        raise ConfigError(
            f"max_length: expected from 2 to {longest}, the model's longest sequence, got "
            f"{max_length}"
        )
    return Scoring(
        opened=opened,
        model=model,
        config=config,
        rule=rule,
        missing_kv=way,
        meaning=meaning,
        batch_size=batch_size,
        max_length=max_length or longest,
        prefix=prefix,
    )
