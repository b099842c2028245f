"""How the requests of tasks are run: the model, its exits and the sizes, checked once."""

from dataclasses import dataclass, field

from offramp.errors import ConfigError
from offramp.generation.config import GenerateConfig
from offramp.generation.exit_rule import ExitRule
from offramp.generation.options import exit_rule, missing_kv_for
from offramp.models.missing_kv import MissingKV
from offramp.models.open import OpenedModel


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A model and where its tokens leave. ``scoring_of`` makes it."""

    opened: OpenedModel
    config: GenerateConfig
    "Threshold, confidence and ``missing_kv``; the tasks choose the rest."
    rule: ExitRule | None
    "What decides where tokens leave; None for full depth."
    missing_kv: MissingKV
    meaning: str | None = None
    "What figures state as ``missing_kv``: exact if all exits are complete; None for full depth."
    batch_size: int = 8
    max_length: int
    prefix: int | None = field(default=None)
    "The token before a text without a context; None if the model has none."


def scoring_of(
    opened: OpenedModel,
    config: GenerateConfig,
    *,
    batch_size: int,
    max_length: int | None,
    prefix: int | None,
) -> Scoring:
    """Check the options against the model; a ConfigError for those that it does not support."""
    rule = exit_rule(opened.model, config, policy=None, fitted=opened.fitted)
    way, meaning = missing_kv_for(opened.model, config, rule)
    longest = opened.model.max_length
    if max_length is not None and not 2 <= max_length <= longest:
        raise ConfigError(
            f"max_length: expected from 2 to {longest}, the model's longest sequence, got "
            f"{max_length}"
        )
    return Scoring(
        opened=opened,
        config=config,
        rule=rule,
        missing_kv=way,
        meaning=meaning,
        batch_size=batch_size,
        max_length=max_length or longest,
        prefix=prefix,
    )
