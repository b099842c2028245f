"""A request to an engine: what its user sees of it, and what the engine keeps until it is done."""

from dataclasses import dataclass, field
from typing import Literal

from offramp.errors import GenerationError
from offramp.generation.config import GenerateConfig
from offramp.generation.exit_rule import ExitRule
from offramp.generation.prefill import Prefill
from offramp.generation.rows import Completion, Row, Token
from offramp.generation.speculative import SpeculativeDecoder
from offramp.models.missing_kv import MissingKV

State = Literal["waiting", "prefill", "decoding", "finished", "cancelled", "failed"]


@dataclass(kw_only=True, eq=False)
class Request:
    """A request and what became of it so far. ``Engine.submit`` makes it."""

    id: str
    prompt: list[int] = field(repr=False)
    config: GenerateConfig = field(repr=False)
    completion: Completion = field(repr=False)
    "The new tokens so far, and why the text ended."
    missing_kv: str | None = None
    """How the keys and values above an exit are computed: propagate, recompute, or exact if all
    exits that may be used are complete; None if no token can leave early."""
    rule: ExitRule | None = field(default=None, repr=False)
    "What decides where tokens leave; None for full depth."
    state: State = "waiting"
    """``waiting`` for a slot; ``prefill``: its prompt runs; ``decoding``; then ``finished``,
    ``cancelled``, or ``failed`` with an ``error``."""
    error: GenerationError | None = None
    drafted: int = 0
    "Number of drafted tokens."
    accepted: int = 0
    "Number of drafted tokens that the whole model accepted."

    @property
    def done(self) -> bool:
        """Whether no more tokens come."""
        return self.state in ("finished", "cancelled", "failed")


@dataclass(frozen=True, kw_only=True)
class Event:
    """A new token of a request, or its failure."""

    request: Request
    token: Token | None
    "None if the request failed; ``request.error`` says why."


@dataclass(kw_only=True, eq=False)
class Job:
    """What the engine keeps of a request until it is done."""

    request: Request
    row: Row
    way: MissingKV
    draft_exit: int | None
    slot: int = -1
    prefill: Prefill | None = None
    drafts: SpeculativeDecoder | None = None
