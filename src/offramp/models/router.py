"""What a model needs to know to route a token in one call: the rule of each exit, as numbers.

A model that can run from exit to exit without returning to Python has a ``Router`` for a cache
(``EarlyExitModel.router``). The results are those of the same steps one by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from offramp.exits.gate import Gate
from offramp.models.work import Work


@dataclass(frozen=True, kw_only=True)
class GateRule:
    """The gate of one exit before the last layer, and which of its scores leave.

    A token leaves if its score is at least the bound, or, with ``extra``, if the loss that the
    ``gain`` gate predicts here is at most that of each later exit plus its ``extra``.
    """

    layer: int
    gate: Gate
    bounds: Float[Tensor, " N"]
    """One bound, or one for each new token of a row, in float32. For a ladder, so many for each
    rung."""
    extra: tuple[float, ...] | None = None
    "Price x cost of running on to each later exit, the last layer included."


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """The rules of all exits before the last layer (none: full depth), and the missing KV."""

    exits: tuple[GateRule, ...] = ()
    score: Literal["gate", "gain"] = "gain"
    "What the gates' outputs mean."
    recompute: bool = False


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Where each token of a call left, and the logits of the next token there."""

    logits: Float[Tensor, "B V"]
    exit_layers: list[int]
    confidence: list[float]
    "The score at the exit where the token left; at the last layer, its largest probability."
    likeliest: list[tuple[float, int]] | None = None
    "The largest of each row's logits and its token id; None if they were not looked for."
    broken: Mapping[int, int] = field(default_factory=dict)
    """Rows whose score at an exit is not a number, by their place in the call, with the exit's
    layer. Their logits mean nothing."""


@runtime_checkable
class Router(Protocol):
    """Runs new tokens until they leave, and keeps the pending keys and values of its cache."""

    def step(
        self,
        ids: list[int],
        rows: list[int],
        positions: list[int],
        since_prompt: list[int],
        work: Work,
    ) -> Routed:
        """Run some new tokens, each of one of ``rows`` at its position; count what ran in ``work``.

        They are at most FEW_TOKENS (base.py). A row has one of them; if the spec has no exits, it
        may have several, at consecutive positions, and each sees those before it.

        ``since_prompt`` is the place of each row's bound in ``GateRule.bounds``, or the last one
        if there are fewer: the number of its new tokens before this one, if the spec has one bound
        for each.
        """

    def run_on(self, place: int, work: Work) -> Float[Tensor, " V"]:
        """Return the last layer's logits of a token of the last step, which left early.

        The token is given by its place in that step, and runs on from its exit. Later steps are
        those that they would be without this call.
        """

    def drop(self, row: int) -> None:
        """Forget the pending tokens of a row of the cache, which ends here."""
