"""What a user can ask of generation, checked against the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offramp.errors import ConfigError
from offramp.exits.confidence import confidence_named
from offramp.exits.gate import FittedExits
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.confident_exit import MISSING_KV, ExitRule, MissingKV
from offramp.generation.sampling import SamplingConfig
from offramp.models.base import EarlyExitModel

MOST_DRAFTS = 15
"""So that a draft is verified as the few tokens that it is, in the arithmetic of one token."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """How a text is generated: at full depth, with confident exits, or speculatively.

    ``threshold`` asks for confident exits, ``speculative`` for drafts by the first exit that the
    whole model verifies; the output is then that of full depth, only sooner.
    """

    max_new_tokens: int = 128
    "New tokens at most."
    stop_tokens: tuple[int, ...] = ()
    "Token ids that end the text: the one that comes is the last token and has no text."
    stop_strings: tuple[str, ...] = ()
    "Strings that end the text and do not belong to it; they need a tokenizer."
    threshold: float | tuple[float, ...] | None = None
    "Confidence at which a token leaves: for all exits, or one for each but the last."
    confidence: str = "max_prob"
    "The measure of confidence, for exits and drafts."
    missing_kv: MissingKV = "propagate"
    "Keys and values above an exit: propagate the exit's state, or recompute them when needed."
    speculative: bool = False
    "Draft with the first layers, verify with the rest."
    draft_exit: int | None = None
    "The exit that drafts; by default the model's first."
    draft_threshold: float = 0.3
    "A draft ends where the exit's confidence falls below this."
    max_drafts: int = 5
    "Tokens in a draft at most."
    lookup: int = 2
    """So many tokens that stood in the text before are followed by a draft of what followed them
    there; 0: only the exit drafts."""
    adaptive: bool = True
    "Stop drafting where it does not pay, and try again now and then."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not 1 <= self.max_drafts <= MOST_DRAFTS:
            raise ConfigError(
                f"max_drafts: expected from 1 to {MOST_DRAFTS}, got {self.max_drafts}"
            )
        if self.lookup < 0:
            raise ConfigError(f"lookup: expected at least 0, got {self.lookup}")
        if any(not text for text in self.stop_strings):
            raise ConfigError("stop_strings: expected strings of at least 1 character, got ''")
        if self.missing_kv not in MISSING_KV:
            expected = " or ".join(MISSING_KV)
            raise ConfigError(f"missing_kv: expected {expected}, got {self.missing_kv!r}")
        if math.isnan(self.draft_threshold):
            raise ConfigError("draft_threshold: expected a number, got nan")
        if self.speculative and self.threshold is not None:
            raise ConfigError(
                "threshold: expected none with speculative decoding, which verifies every token "
                f"at full depth (draft_threshold ends drafts), got {self.threshold}"
            )
        confidence_named(self.confidence)


def check_prompt(prompt: Sequence[int], model: EarlyExitModel) -> None:
    """ConfigError unless the prompt has tokens and leaves room for a new one."""
    if not prompt:
        raise ConfigError("prompt: expected at least 1 token, got none")
    if len(prompt) > model.max_length:
        raise ConfigError(
            f"prompt: expected at most {model.max_length} tokens, the model's longest sequence, "
            f"got {len(prompt)}"
        )


def check_tokens(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """ConfigError unless these are tokens of the model."""
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
    """Who leaves where; None for full depth. A ``policy`` takes the threshold's place."""
    if policy is None and config.threshold is None:
        return None
    if len(model.exit_layers) == 1:
        raise ConfigError(
            "threshold: expected a model with an exit before its last layer, got one without"
        )
    if policy is None:
        assert config.threshold is not None
        policy = ThresholdPolicy.of(config.threshold, len(model.exit_layers))
    elif config.speculative:
        raise ConfigError("policy: expected none with speculative decoding, which has no exits")
    for layer in model.exit_layers[:-1] if confidence_named(config.confidence).needs_gate else ():
        fitted.gate(config.confidence, layer)  # ConfigError where there is none
    return ExitRule(policy=policy, confidence=config.confidence, fitted=fitted)


def draft_exit(model: EarlyExitModel, config: GenerateConfig, fitted: FittedExits) -> int:
    """The exit layer that drafts."""
    measure = confidence_named(config.confidence)
    if config.confidence == "patience" or measure.needs_previous_state:
        raise ConfigError(
            "confidence: expected a measure that reads one exit alone for drafts, "
            f"got {config.confidence!r}"
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
        fitted.gate(config.confidence, chosen)
    return chosen
