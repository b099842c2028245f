"""Deferred keys and values: those of tokens that left early, in the layers above their exit.

A token that left at layer e has no keys and values above e. They are pending until a later token
of its row runs deeper. Before that token runs the layers to the next exit,

- ``propagate`` computes them from the state at the exit (Elbayad et al. 2020; CALM), if possible in
  the same matrix products as those of the later token;
- ``recompute`` runs those layers for all pending tokens of the row, together with the later token.

Either way one call serves every pending token, and keys and values that no token reads are never
computed.

Blocks above the model's ``cache_layers`` write none, so nothing is pending there. From
``complete_from`` on at most one projection is pending, which reads the state that the token has:
there both ways are the same, and ``recompute`` runs pending tokens no further.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from offramp.generation.transfer import on_device
from offramp.models.base import FEW_TOKENS, EarlyExitModel, Step
from offramp.models.kv_cache import KVCache
from offramp.models.missing_kv import MissingKV
from offramp.models.work import Work


class PendingToken(NamedTuple):
    """A token that left early, whose keys and values above its exit are not computed yet."""

    layer: int
    state: Float[Tensor, " D"]
    "Its state after ``layer``."
    position: int


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Some tokens at the same layer, ordered by row and by position in the row."""

    states: list[Tensor]
    "The state (D,) of each."
    positions: list[int]
    rows: list[int]
    "The row of the cache that each token belongs to."

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(
            states=self.states[part], positions=self.positions[part], rows=self.rows[part]
        )

    def where(self, chosen: Sequence[bool]) -> "Tokens":
        """Return the tokens whose place in ``chosen`` is true."""
        return Tokens(
            states=list(compress(self.states, chosen)),
            positions=list(compress(self.positions, chosen)),
            rows=list(compress(self.rows, chosen)),
        )

    def __add__(self, later: "Tokens") -> "Tokens":
        return Tokens(
            states=self.states + later.states,
            positions=self.positions + later.positions,
            rows=self.rows + later.rows,
        )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One token of each of some rows, between an exit (or the embedding) and the next exit."""

    h: Float[Tensor, "B 1 D"]
    "States at ``start``."
    start: int
    stop: int
    "The segment runs blocks start+1 .. stop."
    rows: list[int]
    positions: list[int]
    step: Step
    previous_state: bool = False
    "Whether the blocks run in two calls, so that the states one block before ``stop`` are known."

    @property
    def tokens(self) -> Tokens:
        """The same tokens as a list."""
        return Tokens(states=list(self.h[:, 0]), positions=self.positions, rows=self.rows)


class DeferredKV:
    """The queue of pending tokens at each exit, and the two ways to compute their missing KV.

    ``run`` runs a segment; ``defer`` puts a token that leaves at an exit into the queue. ``work``
    counts what ran. ``missing_kv`` holds the way of each row of the cache.
    """

    def __init__(
        self, model: EarlyExitModel, cache: KVCache, *, missing_kv: list[MissingKV], work: Work
    ) -> None:
        self.model, self.cache, self.work = model, cache, work
        self.missing_kv, self.one_row = missing_kv, len(missing_kv) == 1
        self._queues: dict[int, dict[int, list[tuple[Tensor, int]]]] = defaultdict(dict)

    def defer(self, layer: int, row: int, state: Float[Tensor, " D"], position: int) -> None:
        """Queue a token whose keys and values above ``layer`` are not computed yet.

        If no block above it writes any, nothing is missing, so the token is not queued.
        """
        if layer < self.model.cache_layers:
            self._queues[layer].setdefault(row, []).append((state, position))

    def pending(self, row: int) -> list[PendingToken]:
        """Return the pending tokens of a row, by layer and position."""
        return [
            PendingToken(layer, *token)
            for layer, queue in sorted(self._queues.items())
            for token in queue.get(row, ())
        ]

    def waits(self, layer: int, rows: Sequence[int]) -> bool:
        """Return whether a token of one of ``rows`` is pending at ``layer``."""
        queue = self._queues.get(layer)
        return queue is not None and any(row in queue for row in rows)

    def forget(self, row: int) -> None:
        """Remove the pending tokens of a row whose text is complete."""
        for queue in self._queues.values():
            queue.pop(row, None)

    def run(self, segment: Segment) -> tuple[Float[Tensor, "B 1 D"], Float[Tensor, "B 1 D"]]:
        """Run a segment, computing the keys and values of pending tokens of its rows, too.

        Returns the states one block before ``stop`` (with ``previous_state``; else those at
        ``start``) and the states at ``stop``.
        """
        pending = self._take(segment.start, segment.rows)
        if not len(pending):
            return self._blocks(segment)
        ways = {self.missing_kv[row] for row in pending.rows}
        if ways == {"propagate"} or segment.start >= self.model.complete_from:
            return self.propagate(pending, segment)
        return self.recompute(pending, segment) if len(ways) == 1 else self.both(pending, segment)

    def propagate(self, pending: Tokens, segment: Segment) -> tuple[Tensor, Tensor]:
        """Run a segment; pending tokens keep their states, from which their KV are projected."""
        start, stop, count = segment.start, segment.stop, len(pending)
        top = min(stop, self.model.cache_layers)
        self._defer(stop, pending, pending.states)
        if not self.model.fills_beside(count + len(segment.rows)):
            for states, step in self._calls(pending, few=self.model.rounds_alike()):
                self.work.keys_values[states.shape[0] * states.shape[1]] += top - start
                self.model.project_kv(states, start, top, step=step)
            return self._blocks(segment)
        self.work.keys_values[count] += top - start
        h, step = self._call(pending + segment.tokens)
        places = torch.arange(count + len(segment.rows), device=h.device)
        active = (places >= count).view(h.shape[:2])
        running = len(segment.rows)
        previous, h = self._blocks(replace(segment, h=h, step=step), active=active, running=running)
        return _each_a_row(previous)[count:], _each_a_row(h)[count:]

    def recompute(self, pending: Tokens, segment: Segment) -> tuple[Tensor, Tensor]:
        """Run a segment for its own tokens and the pending ones, in one call.

        Pending tokens run at most to ``complete_from``; the segment's own tokens run on from there.
        """
        stop = min(segment.stop, self.model.complete_from)
        previous, h = self._through(pending + segment.tokens, replace(segment, stop=stop))
        count = len(pending)
        self._defer(stop, pending, list(h[:count, 0]))
        if stop < segment.stop:
            return self.run(replace(segment, h=h[count:], start=stop))
        return previous[count:], h[count:]

    def both(self, pending: Tokens, segment: Segment) -> tuple[Tensor, Tensor]:
        """Run a segment for pending tokens of which only some rows recompute.

        Those run first, by themselves; then the others are propagated beside the segment's tokens.
        """
        segments = replace(segment, stop=min(segment.stop, self.model.complete_from)), segment
        rerun, kept = (
            pending.where([(self.missing_kv[row] == way) for row in pending.rows])
            for way in ("recompute", "propagate")
        )
        _, states = self._through(rerun, segments[0])
        self._defer(segments[0].stop, rerun, list(states[:, 0]))
        previous, h = self.propagate(kept, segments[0])
        if segments[0].stop < segment.stop:
            return self.run(replace(segment, h=h, start=segments[0].stop))
        return previous, h

    def _through(self, tokens: Tokens, segment: Segment) -> tuple[Tensor, Tensor]:
        """Run tokens instead of the segment's own, in calls; return states as ``_blocks`` does."""
        few = not self.one_row or self.model.rounds_alike()
        parts = [
            self._blocks(replace(segment, h=h, step=step))
            for h, step in self._calls(tokens, few=few)
        ]
        previous, h = (
            torch.cat([_each_a_row(state) for state in states])
            for states in zip(*parts, strict=True)
        )
        return previous, h

    def _take(self, layer: int, rows: Sequence[int]) -> Tokens:
        """Remove the pending tokens of ``rows`` from the queue of ``layer`` and return them."""
        queue = self._queues[layer]
        found = [(row, queue.pop(row)) for row in rows if row in queue]
        return Tokens(
            states=[state for _, tokens in found for state, _ in tokens],
            positions=[position for _, tokens in found for _, position in tokens],
            rows=[row for row, tokens in found for _ in tokens],
        )

    def _defer(self, layer: int, pending: Tokens, states: Sequence[Tensor]) -> None:
        """Queue tokens that were pending below ``layer`` at ``layer``, with new states."""
        for row, state, position in zip(pending.rows, states, pending.positions, strict=True):
            self.defer(layer, row, state, position)

    def _call(self, tokens: Tokens) -> tuple[Float[Tensor, "B T D"], Step]:
        """Return the states and the step of a call for these tokens.

        In a batch each token is its own row, (N, 1, D); otherwise all are one row, (1, N, D).
        """
        device = self.model.device
        states = torch.stack(tokens.states)
        positions, end = on_device(tokens.positions, device), max(tokens.positions) + 1
        if self.one_row:
            return states[None], Step(positions=positions[None], cache=self.cache, end=end)
        rows = on_device(tokens.rows, device)
        step = Step(positions=positions[:, None], cache=self.cache, rows=rows, end=end)
        return states[:, None], step

    def _calls(self, tokens: Tokens, *, few: bool) -> Iterator[tuple[Tensor, Step]]:
        """Yield the states and steps of calls for these tokens, in order.

        With ``few`` a call has at most FEW_TOKENS tokens: a model that rounds alike does so in
        such calls, and in a batch a row of the cache may be copied for each token that reads it. A
        token reads earlier tokens of its row, which are in the same call or an earlier one.
        """
        size = FEW_TOKENS if few else len(tokens)
        for first in range(0, len(tokens), size):
            yield self._call(tokens[first : first + size])

    def _blocks(
        self,
        segment: Segment,
        *,
        active: Bool[Tensor, "B T"] | None = None,
        running: int | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
        """Run the blocks of a segment on its states, which may be those of any tokens (B, T, D).

        Returns the states one block before ``stop`` and those at ``stop``. Without
        ``previous_state`` the former are the states at ``start``. ``running`` is the number of
        ``active`` tokens.
        """
        h, start, stop, step = segment.h, segment.start, segment.stop, segment.step
        cut = stop - 1 if segment.previous_state else start
        self.work.blocks[h.shape[0] * h.shape[1] if running is None else running] += stop - start
        previous = h
        if cut > start:
            previous = self.model.run_layers(h, start, cut, step=step, active=active)
        return previous, self.model.run_layers(previous, cut, stop, step=step, active=active)


def _each_a_row(h: Float[Tensor, "B T D"]) -> Float[Tensor, "N 1 D"]:
    return h.reshape(-1, 1, h.shape[-1])
