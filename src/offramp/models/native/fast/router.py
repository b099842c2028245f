"""Routes a token from the embedding to the exit where it leaves, in one call of the kernels.

Between two exits Python has nothing to do: ``_route.h`` runs blocks, evaluates the exit's gate,
compares its score, computes the logits of the tokens that leave, and keeps the pending keys and
values (generation/deferred.py).
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.errors import ConfigError
from offramp.models.base import FEW_TOKENS
from offramp.models.checks import check_tensor
from offramp.models.kv_cache import KVCache
from offramp.models.native.fast.heads import logits_at
from offramp.models.native.fast.kernel_weights import KernelWeights
from offramp.models.native.fast.kernels import KernelCache
from offramp.models.native.fast.products import CPU, scratch_of
from offramp.models.native.fast.route_table import (
    Head,
    RouteStruct,
    can_route,
    exits_of,
    gate_eps,
    head_of,
    of_cache,
    of_weights,
    struct_of,
)
from offramp.models.native.fast.steps import FastSteps
from offramp.models.native.fast.tokens import kernel_cache
from offramp.models.router import Routed, RouterSpec
from offramp.models.work import Work

try:
    from offramp.models.native.fast import _few_tokens
except ImportError:  # then no model has weights in the form of the kernels, and no router
    _few_tokens = None  # type: ignore[assignment]


class CompiledRouter:
    """A ``Router`` (models/router.py) of the native decoder, for one cache.

    ``unembed`` computes the logits (N, 1, V) of states (N, 1, D) at each of some layers, whose
    heads the kernels cannot read (None in ``heads``, which has one entry for each exit and the
    last layer).
    """

    def __init__(
        self,
        *,
        spec: RouterSpec,
        weights: KernelWeights,
        cache: KernelCache,
        embeddings: Tensor,
        heads: Sequence[Head | None],
        unembed: Callable[[list[tuple[Tensor, int]]], list[Tensor]],
        complete_from: int,
        vocab_size: int,
    ) -> None:
        cache.require(weights)
        form = (embeddings.shape[0], weights.hidden)
        check_tensor("embeddings", embeddings, form, weights.dtype, CPU, contiguous=True)
        self.spec, self.layers = spec, (*(each.layer for each in spec.exits), weights.count)
        self._heads, self._unembed = list(heads), unembed
        self._cache, self._weights, self._vocab = cache, weights, vocab_size
        _check_heads(heads, (vocab_size, weights.hidden))
        self._exits, held = exits_of(spec, heads, weights.hidden, weights.count)
        self._space = _space_for(spec, weights, heads)
        self._running = torch.empty(FEW_TOKENS, weights.hidden)
        self._held = (held, embeddings)
        self._plan = struct_of(
            RouteStruct,
            {
                **{name: space.data_ptr() for name, space in self._space.items()},
                **dict.fromkeys((f"pending_{name}" for name in _PENDING), 0),
                **of_weights(weights),
                **of_cache(cache),
                "embeddings": embeddings.data_ptr(),
                "exits": ctypes.addressof(self._exits),
                "gate_eps": gate_eps(spec),
                "complete_from": complete_from,
                "recompute": spec.recompute,
                "gain": spec.score == "gain",
                "exit_count": len(self.layers),
                "vocab": vocab_size,
                "pending": 0,
                "pending_space": 0,
            },
        )
        self._pending: dict[str, Tensor] = {}
        self._last: list[tuple[int, int, int]] = []  # row, position and exit of each token
        self._grow(8 * FEW_TOKENS)

    def step(
        self,
        ids: list[int],
        rows: list[int],
        positions: list[int],
        since_prompt: list[int],
        work: Work,
    ) -> Routed:
        """Run one token of each of ``rows``: see ``Router``."""
        plan, threads = self._plan, torch.get_num_threads()
        if plan.pending + FEW_TOKENS > plan.pending_space:
            self._grow(2 * plan.pending_space)
        logits = torch.empty(len(ids), self._vocab, dtype=self._weights.dtype)
        try:
            tokens, calls = _few_tokens.route(
                ctypes.addressof(plan),
                ids,
                rows,
                positions,
                since_prompt,
                self._running.data_ptr(),
                logits.data_ptr(),
                self._cache.scores(threads),
                threads,
            )
        except ValueError as error:
            raise ConfigError(f"tokens: {error}, got {ids} at {positions}") from None
        self._count(calls, work)
        exits = [exit for exit, *_ in tokens]
        self._last = list(zip(rows, positions, exits, strict=True))
        self._own_logits(logits, self._space["states"], exits)
        layers, scores, likeliest, broken = [], [], [], {}
        for place, (exit, score, best, top) in enumerate(tokens):
            if exit < 0:
                broken[place] = self.layers[exit := -1 - exit]
            elif self._heads[exit] is None and exit + 1 == len(self.layers):
                score = float(logits[place].float().softmax(dim=-1).amax())
            layers.append(self.layers[exit])
            scores.append(score)
            likeliest.append((top, best))
        every = all(exit < 0 or self._heads[exit] for exit in exits)
        return Routed(
            logits=logits,
            exit_layers=layers,
            confidence=scores,
            likeliest=likeliest if every else None,
            broken=broken,
        )

    @torch.inference_mode()
    def _own_logits(self, logits: Tensor, states: Tensor, exits: Sequence[int]) -> None:
        """Let the model compute the logits of the tokens at exits whose head is not readable."""
        own = sorted({exit for exit in exits if exit >= 0 and self._heads[exit] is None})
        if not own:
            return
        places = [[n for n, each in enumerate(exits) if each == exit] for exit in own]
        parts = [
            (states[at].to(self._weights.dtype)[:, None], self.layers[exit])
            for at, exit in zip(places, own, strict=True)
        ]
        for at, found in zip(places, self._unembed(parts), strict=True):
            logits[at] = found[:, 0]

    def run_on(self, place: int, work: Work) -> Tensor:
        """Run a token of the last step on to the last layer: see ``Router``."""
        row, position, exit = self._last[place]
        logits = torch.empty(1, self._vocab, dtype=self._weights.dtype)
        threads = torch.get_num_threads()
        try:
            _, calls = _few_tokens.run_on(
                ctypes.addressof(self._plan),
                place,
                exit,
                row,
                position,
                self._running.data_ptr(),
                logits.data_ptr(),
                self._cache.scores(threads),
                threads,
            )
        except ValueError as error:
            raise ConfigError(f"token: {error}, got number {place}") from None
        self._count(calls, work)
        if self._heads[-1] is None:
            self._own_logits(logits, self._running, [len(self.layers) - 1])
        return logits[0]

    def drop(self, row: int) -> None:
        """Forget the pending tokens of a row: see ``Router``."""
        plan, pending = self._plan, self._pending
        kept = (pending["rows"][: plan.pending] != row).nonzero()[:, 0]
        for each in pending.values():
            each[: len(kept)] = each[kept]
        plan.pending = len(kept)

    def _count(self, calls: Sequence[tuple[int, int, int, int]], work: Work) -> None:
        for kind, exit, tokens, count in calls:
            if kind == _BLOCKS:
                work.blocks[tokens] += count
            elif kind == _KEYS_VALUES:
                work.keys_values[tokens] += count
            else:
                of = work.evaluations if kind == _EVALUATED else work.heads
                of[self.layers[exit], tokens] += count

    def _grow(self, space: int) -> None:
        """Make room for this many pending tokens."""
        plan = self._plan
        for name in _PENDING:
            shape = (space, self._weights.hidden) if name == "states" else (space,)
            dtype = torch.float32 if name == "states" else torch.long
            larger = torch.empty(shape, dtype=dtype)
            if plan.pending:
                larger[: plan.pending] = self._pending[name][: plan.pending]
            self._pending[name] = larger
            setattr(plan, f"pending_{name}", larger.data_ptr())
        plan.pending_space = space


def _check_heads(heads: Sequence[Head | None], shape: tuple[int, int]) -> None:
    """Raise a ConfigError for an LM head of another shape, or on another device."""
    for head in heads:
        if head is not None and (tuple(head.weight.shape) != shape or not head.weight.is_cpu):
            raise ConfigError(f"head: expected {shape}, got {tuple(head.weight.shape)}")


def _space_for(
    spec: RouterSpec, weights: KernelWeights, heads: Sequence[Head | None]
) -> dict[str, Tensor]:
    """Return the space of a call, by the names of ``RouteStruct``."""
    hidden, gates = weights.hidden, [each.gate for each in spec.exits]
    prepared = [scratch_of(head.weight, hidden) for head in heads if head is not None]
    units = max([gate.up_proj.out_features for gate in gates], default=0)
    outputs = max([gate.out_proj.out_features for gate in gates], default=0)
    return {
        "x": torch.empty(FEW_TOKENS, hidden),
        "slots": torch.empty(FEW_TOKENS, dtype=torch.long),
        "rows": torch.empty(FEW_TOKENS, dtype=torch.long),
        "room": torch.empty(FEW_TOKENS * weights.room),
        "gate": torch.empty(FEW_TOKENS * (max([hidden, *prepared]) + units + outputs)),
        "states": torch.empty(FEW_TOKENS, hidden),
    }


_PENDING = ("states", "slots", "rows", "layers")
_BLOCKS, _KEYS_VALUES, _EVALUATED, _LEFT = range(4)  # as in _route.h


def router_of(
    model: Any, fast: FastSteps, cache: KVCache, spec: RouterSpec
) -> CompiledRouter | None:
    """Return a router of the native decoder ``model``; None if the kernels cannot run it."""
    embeddings = model.model.embed_tokens.weight.detach()
    tables = model.get_buffer("cos"), model.get_buffer("sin")
    weights = fast.weights.of(cache).kernel
    if weights is None or not can_route(spec) or not hasattr(_few_tokens, "route"):
        return None
    if weights.dtype != cache.keys.dtype or not cache.keys.is_cpu:
        return None
    readable = embeddings.is_cpu and embeddings.is_contiguous()
    if not readable or embeddings.dtype != weights.dtype:
        return None

    def head_at(layer: int) -> tuple[Any, Any]:
        found: tuple[Any, Any] = model.exits.head_at(layer, model.model.norm, model.lm_head)
        return found

    return CompiledRouter(
        spec=spec,
        weights=weights,
        cache=kernel_cache(cache, fast.wide_tables.of(tables)),
        embeddings=embeddings,
        heads=[
            head_of(*head_at(layer))
            for layer in (*(each.layer for each in spec.exits), model.num_layers)
        ],
        unembed=lambda parts: logits_at(fast, [(h, *head_at(layer)) for h, layer in parts]),
        complete_from=model.complete_from,
        vocab_size=model.vocab_size,
    )
