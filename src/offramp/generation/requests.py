"""A request to an engine: what its user sees of it, and what the engine keeps until it is done."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers import Tokenizer
from torch import Tensor

from offramp.errors import ConfigError, GenerationError
from offramp.exits.gate import FittedExits
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.config import GenerateConfig
from offramp.generation.exit_rule import ExitRule
from offramp.generation.options import (
    check_request,
    draft_exit,
    exit_rule,
    missing_kv_for,
    token_ids,
)
from offramp.generation.prefill import Prefill
from offramp.generation.rows import Completion, Row, Token
from offramp.generation.speculative import SpeculativeDecoder
from offramp.models.base import EarlyExitModel
from offramp.models.missing_kv import MissingKV
from offramp.models.work import Work

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
    draft_work: Work = field(default_factory=Work, repr=False)
    "The work of drafts and of their verification; empty without ``speculative``."

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


def new_job(
    prompt: Sequence[int] | Tensor,
    config: GenerateConfig,
    *,
    model: EarlyExitModel,
    tokenizer: Tokenizer | None,
    capacity: int,
    fitted: FittedExits,
    policy: ThresholdPolicy | GainPolicy | None,
    logprobs: int | None,
) -> Job:
    """Check a request against the model, and return what the engine keeps of it.

    Its request has no id yet. Raises ConfigError for a request that cannot run.
    """
    prompt = token_ids(prompt)
    rule = exit_rule(model, config, policy=policy, fitted=fitted)
    about: Any = {"model": model, "tokenizer": tokenizer, "capacity": capacity}
    check_request(prompt, config, **about)
    if logprobs is not None and logprobs < 0:
        raise ConfigError(f"logprobs: expected at least 0, got {logprobs}")
    way, meaning = missing_kv_for(model, config, rule)
    drafting = draft_exit(model, config, fitted) if config.speculative else None
    row = Row(prompt, config, logprobs=logprobs, **about)
    request = Request(
        id="",
        prompt=prompt,
        config=config,
        completion=row.completion,
        missing_kv=meaning,
        rule=rule,
    )
    return Job(request=request, row=row, way=way, draft_exit=drafting)
