"""The narrow waist: the only way in which offramp talks to a model.

Objectives, policies, evaluation, calibration and decoding use these four methods and never
touch a model class by name.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from offramp.models.exit_heads import ExitHeads
from offramp.models.kv_cache import KVCache

FEW_TOKENS = 16
"""Tokens of a call up to which its fixed costs matter, reading the weights above all."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where the tokens of one call stand.

    ``positions`` (B or 1, T) are the tokens' positions in their own row, from 0, padding not
    counted. ``real`` (B, T) is False on padding, or None where there is none. ``cache`` holds
    the keys and values of earlier tokens (None in training), and ``rows`` (B,) says which of
    its rows these are, so that a batch whose rows left at different exits can go on with
    those that stay (None: all of them, in order). A row may stand there more than once, with
    tokens at different positions.
    """

    positions: Int[Tensor, "#B T"]
    real: Bool[Tensor, "B T"] | None = None
    cache: KVCache | None = None
    rows: Int[Tensor, " B"] | None = None
    memo: dict[Any, Any] = field(init=False, default_factory=dict, compare=False, repr=False)
    "What a model made of these places, for its next call with the same step; by model."


@runtime_checkable
class EarlyExitModel(Protocol):
    """A decoder-only Transformer with exits. ``exit_layer = n`` means after n blocks, 1..L."""

    @property
    def num_layers(self) -> int:
        """Number of blocks, L."""

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Where a policy may stop: ascending, the last one is ``num_layers``."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and so where inputs belong."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""

    @property
    def max_length(self) -> int:
        """Positions that the model knows: the longest sequence."""

    @property
    def exits(self) -> ExitHeads:
        """What the exits have of their own, by layer, and whether they were ever trained."""

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for this many rows and positions."""

    def embed(self, input_ids: Int[Tensor, "B T"], *, step: Step) -> Float[Tensor, "B T D"]:
        """Token (and learned position) embeddings."""

    def run_layers(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        active: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Blocks start+1 .. stop. Tokens not ``active`` keep their state, and the keys and
        values that later tokens see are projected from it.
        """

    def project_kv(self, h: Float[Tensor, "B T D"], start: int, stop: int, *, step: Step) -> None:
        """Write only the keys and values of blocks start+1 .. stop into the step's cache.

        A model may have ``fills_beside(tokens)``: whether, for so few tokens, ``run_layers`` makes
        those of tokens that are not active at no cost.
        """

    def unembed(
        self,
        h: Float[Tensor, "B T D"],
        exit_layer: int,
        *,
        vocab: Int[Tensor, " W"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits at an exit: its norm and head, or the final ones where it has none of its own.

        ``vocab`` asks for these rows of the head only.
        """


def whole_step(input_ids: Int[Tensor, "B T"], *, real: Bool[Tensor, "B T"] | None = None) -> Step:
    """The step of whole sequences without a cache, as in training and in traces."""
    if real is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    else:
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    return Step(positions=positions, real=real)


def fills_beside(model: EarlyExitModel, tokens: int) -> bool:
    """Whether tokens that are not active cost ``run_layers`` nothing, of so many in all."""
    own = getattr(model, "fills_beside", None)
    return own is not None and bool(own(tokens))


def states_at(
    model: EarlyExitModel, input_ids: Int[Tensor, "B T"], layers: Iterable[int], *, step: Step
) -> Iterator[tuple[int, Float[Tensor, "B T D"]]]:
    """Yield (layer, state) at each of ``layers``, ascending; blocks above the last never run.

    A model whose blocks cannot be run one by one brings a ``states_at`` of its own, which takes
    the states from one whole pass.
    """
    own = getattr(model, "states_at", None)
    if own is None:
        yield from walk(model, input_ids, layers, step=step)
    else:
        yield from own(input_ids, layers, step=step)


def walk(
    model: EarlyExitModel, input_ids: Int[Tensor, "B T"], layers: Iterable[int], *, step: Step
) -> Iterator[tuple[int, Float[Tensor, "B T D"]]]:
    """``states_at`` by ``embed`` and ``run_layers``."""
    h = model.embed(input_ids, step=step)
    done = 0
    for layer in sorted(layers):
        h = model.run_layers(h, done, layer, step=step)
        done = layer
        yield layer, h
