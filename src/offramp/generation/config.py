"""The options of generation. Imports no PyTorch."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from offramp.errors import ConfigError
from offramp.exits.confidence_names import check_confidence
from offramp.models.missing_kv import EXACT, MissingKV

MISSING_KV: tuple[str, ...] = get_args(MissingKV)
MissingKVChoice = Literal["propagate", "recompute", "exact"]

MOST_DRAFTS = 15
"""Largest number of tokens in a draft. Verifying so few tokens is one call on a few tokens, which
computes each token as if it were alone."""
PENALTIES = (0.01, 100)
"""The least and the largest repetition penalty; with others, logits may be too large."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Options for choosing a token."""

    temperature: float = 0.0
    "Divides the logits; 0 always takes the likeliest token (greedy)."
    top_k: int | None = None
    "Draw from the k likeliest tokens only."
    top_p: float | None = None
    "Draw from the fewest likeliest tokens whose probabilities sum to at least this."
    repetition_penalty: float = 1.0
    """Above 1, tokens that are in the prompt or the output become less likely (CTRL); from 0.01 to
    100."""
    seed: int = 0
    "Seed of the draws; row i of a batch uses seed + i."

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature: expected at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        least, most = PENALTIES
        if not least <= self.repetition_penalty <= most:
            raise ConfigError(
                f"repetition_penalty: expected from {least} to {most}, got "
                f"{self.repetition_penalty}"
            )
        if self.seed < 0:
            raise ConfigError(f"seed: expected at least 0, got {self.seed}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that nothing is drawn."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Options for generating a text: at full depth, with confident exits, or speculatively.

    ``threshold`` turns confident exits on. ``speculative`` turns drafts on, which the whole model
    verifies: the output is that of full depth, and usually faster. In bfloat16 this holds only in
    the native decoder with its compiled kernels, and in float16 it does not hold.
    """

    max_new_tokens: int = 128
    "Largest number of new tokens."
    stop_tokens: tuple[int, ...] = ()
    "Token ids that end the text; such a token is the last one and adds no text."
    stop_strings: tuple[str, ...] = ()
    "Strings that end the text and are not part of it; they need a tokenizer."
    threshold: float | tuple[float, ...] | None = None
    "Confidence at which a token leaves: one number for all exits, or one for each but the last."
    decay: float | None = None
    """Decrease the threshold along the text (CALM): at new token t, counted from 0, of
    max_new_tokens N it is 0.9 threshold + 0.1 exp(-decay t / N). Early tokens, on which all later
    ones depend, then need more confidence to leave. Default: the threshold is constant."""
    confidence: str | None = None
    """The confidence measure, for exits and drafts. By default exits are decided by gain if it was
    fitted and the threshold does not fall (a threshold from 0 to 1 is then a share of probability:
    see ``exits/default_confidence.py``), else by max_prob, and drafts by max_prob."""
    missing_kv: MissingKVChoice = "propagate"
    """How missing keys and values above an exit are computed when a later token needs them: from
    the state at the exit (propagate), or by running the layers (recompute). For complete exits
    both are the same. "exact" requires complete exits."""
    speculative: bool = False
    """Draft tokens with the first layers and verify them with the rest. The text is that without
    drafts in float32, and in bfloat16 with the compiled kernels of the native decoder; elsewhere
    rounding may change it."""
    draft_exit: int | None = None
    "The exit that drafts (default: the first)."
    draft_threshold: float = 0.3
    "A draft ends where the confidence of the exit falls below this number."
    max_drafts: int = 5
    "Largest number of tokens in a draft."
    lookup: int = 2
    """Number of last tokens to search in the earlier text. If they occurred there, the tokens that
    followed them are the draft. 0 turns this off, so that only the exit drafts."""
    adaptive: bool = True
    "Pause a source of drafts that costs more time than it saves, and try it again later."

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
        if self.missing_kv not in (*MISSING_KV, EXACT):
            expected = " or ".join(MISSING_KV)
            raise ConfigError(f"missing_kv: expected {expected}, got {self.missing_kv!r}")
        if math.isnan(self.draft_threshold):
            raise ConfigError("draft_threshold: expected a number, got nan")
        if self.speculative and self.threshold is not None:
            raise ConfigError(
                "threshold: expected none with speculative decoding, which verifies every token "
                f"at full depth (draft_threshold ends drafts), got {self.threshold}"
            )
        if self.decay is not None:
            self._check_decay(self.decay)
        if self.confidence is not None:
            check_confidence(self.confidence)

    @property
    def draft_confidence(self) -> str:
        """The measure that ends a draft."""
        return "max_prob" if self.confidence is None else self.confidence

    def _check_decay(self, tau: float) -> None:
        if not (math.isfinite(tau) and tau >= 0):
            raise ConfigError(f"decay: expected a number of at least 0, got {tau}")
        if self.threshold is None:
            raise ConfigError(f"decay: expected a threshold too, got only decay {tau:g}")
        thresholds = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        for threshold in thresholds:
            if not 0 <= threshold <= 1:
                raise ConfigError(
                    f"decay: expected thresholds from 0 to 1 with it, got {threshold:g}"
                )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of an engine for many requests.

    Its memory is bounded by them: the cache holds ``slots`` x ``capacity`` positions, and at most
    ``waiting`` more prompts of at most ``capacity`` tokens are kept.
    """

    slots: int = 8
    "Number of requests that decode at the same time, each in its own row of the cache."
    capacity: int = 1024
    """Largest number of tokens of a request, its prompt and its new tokens together; at most the
    model's longest sequence."""
    waiting: int = 64
    "Largest number of requests that wait for a slot; one more is refused."
    prefill_tokens: int | None = 64
    """Number of prompt tokens that a step runs beside rows that decode, so that those need not
    wait long; None runs the prompts of all requests that join before another token is decoded."""
    max_wait: int = 0
    """Largest number of steps for which a token that goes deeper than an exit waits there for
    other rows that do; 0: no token waits."""

    def __post_init__(self) -> None:
        least = {"slots": 1, "capacity": 1, "waiting": 0, "prefill_tokens": 1, "max_wait": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ConfigError(f"{name}: expected at least {smallest}, got {value}")
