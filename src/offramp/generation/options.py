"""Check the options of generation against the model."""

import reprlib
from collections.abc import Sequence
from operator import index

from tokenizers import Tokenizer
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits.confidence import confidence_named
from offramp.exits.default_confidence import confidence_and_threshold
from offramp.exits.gate import FittedExits
from offramp.exits.policy import Decay, GainPolicy, ThresholdPolicy
from offramp.generation.config import GenerateConfig
from offramp.generation.exit_rule import ExitRule
from offramp.models.base import EarlyExitModel
from offramp.models.missing_kv import EXACT, MissingKV, complete


def token_ids(prompt: Sequence[int] | Tensor) -> list[int]:
    """Return the token ids of a prompt, a sequence or a tensor (T,) of whole numbers.

    Raises ConfigError for anything else.
    """
    ids = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    try:
        return [index(token) for token in ids]
    except TypeError:
        raise ConfigError(
            f"prompt: expected a list of token ids, got {reprlib.repr(prompt)}"
        ) from None


def check_prompt(prompt: Sequence[int], model: EarlyExitModel) -> None:
    """Raise a ConfigError unless the prompt has tokens and leaves space for a new one."""
    if not prompt:
        raise ConfigError("prompt: expected at least 1 token, got none")
    if len(prompt) > model.max_length:
        raise ConfigError(
            f"prompt: expected at most {model.max_length} tokens, the model's longest sequence, "
            f"got {len(prompt)}"
        )


def check_request(
    prompt: Sequence[int],
    config: GenerateConfig,
    *,
    model: EarlyExitModel,
    tokenizer: Tokenizer | None,
    capacity: int,
) -> None:
    """Raise a ConfigError unless a text can begin and stop as the config says.

    ``capacity`` is the number of positions that the cache has for it.
    """
    check_prompt(prompt, model)
    check_tokens("prompt", prompt, model.vocab_size)
    check_tokens("stop_tokens", config.stop_tokens, model.vocab_size)
    if config.stop_strings and tokenizer is None:
        raise ConfigError("stop_strings: expected a tokenizer too, got none")
    if len(prompt) > capacity:
        raise ConfigError(
            f"prompt: expected at most {capacity} tokens, the capacity of a slot, got {len(prompt)}"
        )


def check_tokens(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise a ConfigError unless these are tokens of the model."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(f"{name}: expected token ids from 0 to {vocab_size - 1}, got {token}")


def exit_rule(
    model: EarlyExitModel,
    config: GenerateConfig,
    *,
    policy: ThresholdPolicy | GainPolicy | None,
    fitted: FittedExits,
) -> ExitRule | None:
    """Return the rule of the exits; None for full depth. ``policy`` replaces the threshold."""
    if policy is None and config.threshold is None:
        return None
    if len(model.exit_layers) == 1:
        raise ConfigError(
            "threshold: expected a model with an exit before its last layer, got one without"
        )
    name = config.confidence
    if policy is None:
        assert config.threshold is not None
        tau, threshold = config.decay, config.threshold
        decay = None if tau is None else Decay(tau=tau, length=config.max_new_tokens)
        if decay and name is None:  # a share of probability that falls would not be one
            name = "max_prob"
        name, threshold = confidence_and_threshold(
            name, threshold, fitted=fitted, exit_layers=model.exit_layers
        )
        policy = ThresholdPolicy.of(threshold, len(model.exit_layers), decay=decay)
    elif config.decay is not None:
        raise ConfigError("decay: expected none with a policy, which has its own thresholds")
    elif config.speculative:
        raise ConfigError("policy: expected none with speculative decoding, which has no exits")
    if name is None:  # a policy has thresholds in the unit of its measure
        name = "gain" if isinstance(policy, GainPolicy) else "max_prob"
    for layer in model.exit_layers[:-1] if confidence_named(name).needs_gate else ():
        fitted.gate(name, layer)  # raises ConfigError if there is none
    return ExitRule(policy=policy, confidence=name, fitted=fitted)


def missing_kv_for(
    model: EarlyExitModel, config: GenerateConfig, rule: ExitRule | None
) -> tuple[MissingKV, str | None]:
    """Return how keys and values above an exit are computed, and what figures state of it.

    Figures state "exact" if all exits that the rule uses are complete, and None without a rule.
    Nothing is missing above a complete exit, so no layer is run for it. Raises ConfigError if the
    config requires complete exits and the model has none, or the rule uses others.
    """
    used = () if rule is None else model.exit_layers
    if rule is not None and isinstance(rule.policy, ThresholdPolicy):
        used = rule.policy.used(used)
    if complete(model, used):
        return "propagate", None if rule is None else EXACT
    chosen = config.missing_kv
    if chosen != EXACT:
        return chosen, None if rule is None else chosen
    least = model.complete_from
    why = "the model has no complete exits"
    if least < model.num_layers:
        why = f"exit {min(used)} is below layer {least}, from which exits are complete"
    raise ConfigError(f"missing_kv: expected propagate or recompute, since {why}, got exact")


def draft_exit(model: EarlyExitModel, config: GenerateConfig, fitted: FittedExits) -> int:
    """Return the exit layer that drafts. Raises ConfigError if no exit fits the options."""
    measure = confidence_named(config.draft_confidence)
    if config.draft_confidence == "patience" or measure.needs_previous_state:
        raise ConfigError(
            "confidence: expected a measure that reads only one exit for drafts, "
            f"got {config.draft_confidence!r}"
        )
    early = model.exit_layers[:-1]
    if not early:
        raise ConfigError(
            "speculative: expected a model with an exit before its last layer, got one without"
        )
    chosen = early[0] if config.draft_exit is None else config.draft_exit
    if chosen not in early:
        exits = ", ".join(map(str, early))
        raise ConfigError(f"draft_exit: expected one of the exits {exits}, got {chosen}")
    if measure.needs_gate:
        fitted.gate(config.draft_confidence, chosen)
    return chosen
