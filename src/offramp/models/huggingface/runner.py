"""Run the blocks of a Hugging Face model one by one, with or without a ``KVCache``.

Attention layers of ``transformers`` pass their new keys and values to a cache object and attend
to the keys and values that it returns. ``StepCache`` is such an object for one call: it writes
to our ``KVCache`` at the step's positions and reads from it. If only keys and values are needed,
it stops the block right after the write.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import UnsupportedArchitectureError
from offramp.models.base import Step
from offramp.models.checks import checked_end, require_cache
from offramp.models.huggingface.calls import accepted, named
from offramp.models.huggingface.layout import (
    CACHE,
    MASK,
    POSITIONS,
    STATE,
    Block,
    Layout,
    Longest,
    Rotary,
)
from offramp.models.kv_cache import KVCache


class BlockRunner:
    """The blocks of a model with a known layout; it holds references, not copies.

    ``why_no_cache`` is the reason why keys and values cannot be cached; empty if they can.
    """

    def __init__(self, lm: Any, layout: Layout, *, longest: Longest) -> None:
        self.lm = lm
        self.layout = layout
        self.eager = lm.config._attn_implementation == "eager"
        self.longest = longest
        self.shapes: set[tuple[int, int, int]] = set()
        "(heads, width of a key, width of a value) of the blocks."
        self.why_no_cache = ""

    def embed(self, input_ids: Tensor, step: Step) -> Tensor:
        """Return the input (B, T, D) that the model passes to its first block, for ids (B, T)."""
        self._end(input_ids, step)
        if self.layout.embedding is not None:
            embedded: Tensor = self.layout.embedding(input_ids)
            return embedded
        arguments = accepted(
            self.lm,
            input_ids=input_ids,
            position_ids=step.positions.repeat(len(input_ids) // len(step.positions), 1),
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
        )
        first = self.layout.blocks[0].module
        with first.register_forward_pre_hook(_leave, with_kwargs=True):
            try:
                self.lm(**arguments)
            except _AtFirstBlockError as reached:
                return reached.state
        raise AssertionError("the first block was not reached")

    def run(
        self, h: Tensor, start: int, stop: int, step: Step, active: Tensor | None = None
    ) -> Tensor:
        """Run blocks start+1 .. stop on states (B, T, D)."""
        given = self.given(h, step, StepCache(step, self._end(h, step)))
        for block in self.layout.blocks[start:stop]:
            out = block.module(h, **given(block))
            out = out[0] if isinstance(out, tuple) else out
            h = out if active is None else torch.where(active[..., None], out, h)
        return h

    def project_kv(self, h: Tensor, start: int, stop: int, step: Step) -> None:
        """Write the keys and values of blocks start+1 .. stop, without the rest of the blocks."""
        given = self.given(h, step, StepCache(step, self._end(h, step), leave=True))
        for block in self.layout.blocks[start:stop]:
            try:
                block.module(h, **given(block))
            except _WrittenError:
                continue

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for these blocks."""
        return KVCache(batch_size=batch_size, capacity=capacity, **self._form())

    def _end(self, x: Tensor, step: Step) -> int:
        """Return the end of the positions 0 .. end - 1 at which there are keys."""
        owner = self.layout.head.weight
        if step.cache is not None and not step.cache.known_to(owner):
            step.cache.require_form(owner, **self._form())
        return checked_end(step, x, longest=self.longest.positions, why=self.longest.why)

    def _form(self) -> dict[str, Any]:
        """Return what a cache of these blocks is like."""
        if self.why_no_cache:
            raise UnsupportedArchitectureError(self.why_no_cache)
        [(heads, key_dim, value_dim)] = self.shapes
        weight = self.layout.head.weight
        return {
            "num_layers": len(self.layout.blocks),
            "num_heads": heads,
            "head_dim": key_dim,
            "value_dim": value_dim,
            "dtype": weight.dtype,
            "device": weight.device,
        }

    def given(self, h: Tensor, step: Step, cache: "StepCache") -> "Given":
        """Return the arguments of the blocks in one call."""
        return Given(h, step, cache, eager=self.eager)


class Given:
    """The arguments of the blocks in one call; each mask and table is computed once."""

    def __init__(self, h: Tensor, step: Step, cache: "StepCache", *, eager: bool) -> None:
        self.h, self.step, self.cache, self.eager = h, step, cache, eager
        self.positions = step.positions.expand(len(h), -1)
        self.masks: dict[int | None, Tensor | None] = {}
        self.tables: dict[Rotary, Any] = {}

    def __call__(self, block: Block) -> dict[str, Any]:
        """Return the arguments of a block."""
        return {name: self._value(block, what) for name, what in block.arguments.items()}

    def _value(self, block: Block, what: Any) -> Any:
        if isinstance(what, Rotary):
            if what not in self.tables:
                self.tables[what] = what.module(**self._constants(what.arguments))
            return self.tables[what]
        if what == MASK:
            if block.window not in self.masks:
                self.masks[block.window] = self._mask(block.window)
            return self.masks[block.window]
        if what == CACHE:
            return self.cache if self.cache.used else None
        return self.positions if what == POSITIONS else what

    def _constants(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        anew = {STATE: self.h, POSITIONS: self.positions}
        return {
            name: anew.get(what, what) if isinstance(what, str) else what
            for name, what in arguments.items()
        }

    def _mask(self, window: int | None) -> Tensor | None:
        seen = _mask(self.step, self.cache.end, window, may_leave_out=not self.eager)
        if seen is None:
            return None
        seen = seen.expand(len(self.h), -1, -1, -1)
        if not self.eager:
            return seen
        lowest = torch.finfo(self.h.dtype).min
        return torch.zeros_like(seen, dtype=self.h.dtype).masked_fill(~seen, lowest)


def _mask(step: Step, end: int, window: int | None, *, may_leave_out: bool) -> Tensor | None:
    """Return (B or 1, 1, T, S), True where a query attends; None if causal attention suffices."""
    positions, real = step.positions, step.real
    length = positions.shape[1]
    same_for_all = step.cache is None or length == end or positions.shape == (1, 1)
    if may_leave_out and real is None and same_for_all and (window is None or end <= window):
        return None
    device = positions.device
    if step.cache is not None:  # a key is in the slot of its position: see kv_cache.py
        back = positions[..., None] - torch.arange(end, device=device)  # (B or 1, T, S)
        seen = back >= 0
    else:
        back = positions[:, :, None] - positions[:, None]
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]
    if window is not None:
        seen = seen & (back < window)
    if real is not None and step.cache is None:
        own = torch.eye(length, dtype=torch.bool, device=device)  # padding attends to itself
        seen = seen & real[:, None] | own
    return seen[:, None]


class StepCache:
    """The cache object that attention layers use during one call."""

    def __init__(self, step: Step, end: int, *, leave: bool = False) -> None:
        self.step, self.end, self.leave = step, end, leave

    @property
    def used(self) -> bool:
        """Whether this call has a cache."""
        return self.step.cache is not None

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write a block's new keys and values (B, H, T, Dh); return all of them up to the end."""
        cache, step = require_cache(self.step), self.step
        cache.write(layer_idx, k, v, positions=step.positions, real=step.real, rows=step.rows)
        if self.leave:
            raise _WrittenError
        return cache.read(layer_idx, end=self.end, rows=step.rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens before those of the step."""
        return self.end - self.step.positions.shape[1]


class _WrittenError(Exception):
    """Raised after a block's keys and values are written, to skip the rest of the block."""


class _AtFirstBlockError(Exception):
    """Raised when a forward pass reaches the first block; it carries the state."""

    def __init__(self, state: Tensor) -> None:
        self.state = state


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _AtFirstBlockError(next(iter(named(module, args, kwargs).values())))
