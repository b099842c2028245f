"""What a user can set for generation. Imports no PyTorch."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from offramp.errors import ConfigError
from offramp.exits.confidence_names import check_confidence

MissingKV = Literal["propagate", "recompute"]
MISSING_KV: tuple[str, ...] = get_args(MissingKV)

MOST_DRAFTS = 15
"""Most tokens in a draft, so that verifying it stays a call on a few tokens, in the arithmetic of
one token."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a token is chosen."""

    temperature: float = 0.0
    "Divides the logits; 0 always takes the likeliest token (greedy)."
    top_k: int | None = None
    "Draw from the k likeliest tokens only."
    top_p: float | None = None
    "Draw from the fewest likeliest tokens whose probabilities sum to at least this."
    repetition_penalty: float = 1.0
    "Above 1, tokens that stand in the prompt or the output become less likely (CTRL)."
    seed: int = 0
    "Seed of the draws; row i of a batch has seed + i."

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature: expected at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(
                f"repetition_penalty: expected a number above 0, got {self.repetition_penalty}"
            )
        if self.seed < 0:
            raise ConfigError(f"seed: expected at least 0, got {self.seed}")

    @property
    def greedy(self) -> bool:
        """Nothing is drawn."""
        return self.temperature == 0


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
        check_confidence(self.confidence)
