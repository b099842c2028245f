"""The new tokens of one row, while they are generated and when they are complete."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tokenizers import Tokenizer
from torch import Tensor

from offramp.generation.config import GenerateConfig
from offramp.generation.logprobs import LogProbability, logprobs_of
from offramp.generation.sampling import Sampler
from offramp.generation.text import TextStream
from offramp.models.base import EarlyExitModel

FinishReason = Literal["stop_token", "stop_string", "length"]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One new token."""

    id: int
    text: str
    "The text that the token adds. It may come with a later token: see ``TextStream``."
    exit_layer: int
    "The layer where the token left, or that drafted it if the verification accepted it."
    confidence: float
    logprob: float | None = None
    """Logarithm of the token's probability where it left, before temperature, top-k and top-p;
    None unless the request asks for it."""
    top_logprobs: tuple[LogProbability, ...] = ()
    "The likeliest tokens there with theirs, in order; as many as the request asks for."


@dataclass(kw_only=True)
class Completion:
    """The new tokens of one row."""

    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """The new text."""
        return "".join(token.text for token in self.tokens)

    @property
    def ids(self) -> list[int]:
        """The ids of the new tokens."""
        return [token.id for token in self.tokens]


class Row:
    """One row while it is generated, in a cache of ``capacity`` positions.

    ``logprobs`` is how many of the likeliest tokens each token names with their log probability,
    beside its own; None: not even that.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        config: GenerateConfig,
        *,
        model: EarlyExitModel,
        tokenizer: Tokenizer | None,
        capacity: int,
        logprobs: int | None = None,
    ) -> None:
        self.config, self.completion, self.logprobs = config, Completion(), logprobs
        longest = min(model.max_length, capacity)  # the last new token needs no position
        self.limit = min(config.max_new_tokens, longest - len(prompt) + 1)
        self.sampler = Sampler(config, prompt, vocab_size=model.vocab_size)
        self.stream = TextStream(tokenizer, config.stop_strings)

    def take(self, id: int, exit_layer: int, confidence: float, logits: Tensor) -> Token:
        """Add a token that was chosen from ``logits`` (V,); it may finish the row."""
        self.sampler.keep(id)
        count = len(self.completion.tokens) + 1
        text = ""
        reason: FinishReason | None = None
        if id in self.config.stop_tokens:
            reason = "stop_token"
        else:
            text = self.stream.push(id)
            reason = "stop_string" if self.stream.stopped else None
        if reason is None and count == self.limit:
            reason = "length"
        if reason:
            text += self.stream.flush()
        logprob: float | None = None
        top: tuple[LogProbability, ...] = ()
        if self.logprobs is not None:
            logprob, top = logprobs_of(logits, id, self.logprobs)
        token = Token(
            id=id,
            text=text,
            exit_layer=exit_layer,
            confidence=confidence,
            logprob=logprob,
            top_logprobs=top,
        )
        self.completion.tokens.append(token)
        self.completion.finish_reason = reason
        return token

    def finished(self) -> bool:
        """Whether the row is complete."""
        return self.completion.finish_reason is not None

    @property
    def count(self) -> int:
        """Number of new tokens so far."""
        return len(self.completion.tokens)
