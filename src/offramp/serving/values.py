"""What the HTTP side and the side of the model exchange.

These are plain values, which can be sent to another process, and ``Service``, the protocol by
which ``make_app`` reaches a model.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from offramp.errors import OfframpError

Role = Literal["system", "developer", "user", "assistant"]


class UnavailableError(OfframpError):
    """The model cannot answer now, such as while it stops; another time it may."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A text to generate."""

    prompt: str | tuple[int, ...] | tuple[Message, ...]
    "A text to continue, its token ids, or a conversation for the chat template."
    options: Mapping[str, Any] = field(default_factory=dict)
    "The fields of ``GenerateConfig`` that the request names."
    logprobs: int | None = None
    "Each token names its log probability, and those of so many of the likeliest tokens."


@dataclass(frozen=True, kw_only=True)
class Started:
    """The first thing that a service tells of a text: it is accepted."""

    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """A new token."""

    id: int
    text: str
    "The text that it adds to the answer; it may come with a later token."
    exit_layer: int
    confidence: float
    word: str = ""
    "The token by itself as text, if log probabilities are asked for."
    logprob: float | None = None
    top_logprobs: tuple[tuple[str, float], ...] = ()
    "The likeliest tokens as text, with their log probabilities."


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Why a text ended, and the figures of it."""

    finish_reason: Literal["stop", "length"]
    mean_layers: float
    "Mean number of layers that a new token ran."
    flops_pct: float
    "Estimated FLOPs of the new tokens, heads and gates included, in percent of full depth."
    missing_kv: str | None
    confidence: str | None
    acceptance_rate: float | None
    tokens_per_s: float | None
    seconds_to_first_token: float


@dataclass(frozen=True, kw_only=True)
class Piece:
    """New tokens of a text, and its end with the last of them."""

    tokens: tuple[NewToken, ...]
    end: Ending | None = None


@dataclass(frozen=True, kw_only=True)
class Cap:
    """The thresholds of a certificate, below which no request may go."""

    thresholds: tuple[float, ...]
    confidence: str
    missing_kv: str


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the API says of the model."""

    id: str
    created: int
    "Unix time at which the server started."
    num_layers: int
    exit_layers: tuple[int, ...]
    exits_trained: bool
    confidences: tuple[str, ...]
    "The measures that a request may name."
    default_confidence: str | None
    "The measure that decides if a request names none; None without exits."
    flops_pct: Mapping[int, float]
    "By exit layer: the FLOPs of a token that leaves there, in percent of full depth."
    max_tokens: int
    "Largest number of new tokens that a request may ask for."
    capacity: int
    "Largest number of tokens of a prompt with its answer."
    vocab_size: int
    most_prompts: int
    "Largest number of prompts in one request."
    chat: bool
    certificate: Cap | None = None


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy a service is."""

    running: int
    waiting: int
    healthy: bool = True
    "Whether it can answer at all."


class Service(Protocol):
    """A model that answers, in this process or in others."""

    @property
    def about(self) -> ModelInfo:
        """The model, as the API describes it."""

    async def start(self) -> None:
        """Begin to answer; the event loop calls it once."""

    async def close(self) -> None:
        """Stop; what still runs fails with UnavailableError."""

    def load(self) -> Load:
        """How busy it is."""

    def answer(self, ask: Ask) -> AsyncGenerator[Started | Piece, None]:
        """Generate a text: first ``Started``, then pieces, of which the last has an ``end``.

        Whoever closes the iterator, or cancels the task that waits for it, cancels the request.
        Raises an OfframpError for a request that cannot run, QueueFullError if too many wait,
        GenerationError if the model fails, and UnavailableError if it stops.
        """
