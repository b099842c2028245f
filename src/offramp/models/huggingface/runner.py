"""Run the blocks of a Hugging Face model one by one, with or without a ``KVCache``.

Attention layers of ``transformers`` pass their new keys and values to a cache object and attend
to the keys and values that it returns. ``_StepCache`` is such an object for one call: it writes
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
    TOKENS,
    Block,
    Layout,
    Rotary,
)
from offramp.models.kv_cache import KVCache


class BlockRunner:
    """The blocks of a model with a known layout; it holds references, not copies.

    ``why_no_cache`` is the reason why keys and values cannot be cached; empty if they can.
    """

    def __init__(self, lm: Any, layout: Layout, *, longest: int) -> None:
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
            position_ids=step.positions.expand(len(input_ids), -1),
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
        given = self._given(h, step, _StepCache(step, self._end(h, step)))
        for block in self.layout.blocks[start:stop]:
            out = block.module(h, **given(block))
            out = out[0] if isinstance(out, tuple) else out
            h = out if active is None else torch.where(active[..., None], out, h)
        return h

    def project_kv(self, h: Tensor, start: int, stop: int, step: Step) -> None:
        """Write the keys and values of blocks start+1 .. stop, without the rest of the blocks."""
        given = self._given(h, step, _StepCache(step, self._end(h, step), leave=True))
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
        return checked_end(step, x, longest=self.longest)

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

    def _given(self, h: Tensor, step: Step, cache: "_StepCache") -> "_Given":
        return _Given(h, step, cache, eager=self.eager)

    # The check against the whole model, once, on a few tokens.

    @torch.no_grad()
    def disagreement(self) -> str:
        """Return why blocks that run one by one do not give the model's states; empty if they do.

        In that case it also tests whether they run with a cache, and sets ``why_no_cache``.
        """
        ids, last = self.layout.ids, len(self.layout.blocks)
        step = Step(positions=torch.arange(TOKENS, device=ids.device)[None])
        try:
            h = self.embed(ids, step)
            given = self._given(h, step, shapes := _Shapes(step, TOKENS))
            for block in self.layout.blocks:
                out = block.module(h, **given(block))
                h = out[0] if isinstance(out, tuple) else out
        except Exception as error:  # depends on the architecture
            return f"its blocks fail when they are run one by one: {error}"
        if not close(h, self.layout.last_state):
            return "its blocks give other states when they are run one by one"
        self.shapes = set(shapes.seen.values())
        if len(self.shapes) != 1 or len(shapes.seen) != last:
            self.why_no_cache = "its blocks do not keep keys and values of one shape"
            return ""
        try:
            found = self._cached_states()
        except Exception as error:
            self.why_no_cache = f"its blocks fail with a cache: {error}"
            return ""
        if not all(close(part, h[:, at]) for part, at in found):
            self.why_no_cache = "its blocks give other states with a cache"
        return ""

    def _cached_states(self) -> list[tuple[Tensor, list[int]]]:
        """Return states of two rows, the second two tokens shorter, and their positions."""
        ids, last, n = self.layout.ids, len(self.layout.blocks), TOKENS
        cache = self.make_cache(2, n)
        both = torch.cat((ids[:, : n - 1], ids[:, : n - 1].roll(2, dims=1)))  # the second padded
        real = torch.ones_like(both, dtype=torch.bool)
        real[1, :2] = False
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        step = Step(positions=positions, real=real, cache=cache)
        prompt = self.run(self.embed(both, step), 0, last, step)
        tokens = torch.cat((ids[:, n - 1 :], ids[:, n - 3 : n - 2]))
        step = Step(positions=torch.tensor([[n - 1], [n - 3]], device=ids.device), cache=cache)
        token = self.run(self.embed(tokens, step), 0, last, step)
        return [
            (prompt[:1], list(range(n - 1))),
            (prompt[1:, 2:], list(range(n - 3))),
            (token[:1], [n - 1]),
            (token[1:], [n - 3]),
        ]


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of their type."""
    worst = (a.float() - b.float()).abs().max()
    return bool(worst <= (1e-3 if a.dtype in (torch.float32, torch.float64) else 0.1) * b.std())


class _Given:
    """The arguments of the blocks in one call; each mask and table is computed once."""

    def __init__(self, h: Tensor, step: Step, cache: "_StepCache", *, eager: bool) -> None:
        self.h, self.step, self.cache, self.eager = h, step, cache, eager
        self.positions = step.positions.expand(len(h), -1)
        self.masks: dict[int | None, Tensor | None] = {}
        self.tables: dict[Rotary, Any] = {}

    def __call__(self, block: Block) -> dict[str, Any]:
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


class _StepCache:
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


class _Shapes(_StepCache):
    """Records the shapes of keys and values without storing them."""

    def __init__(self, step: Step, end: int) -> None:
        super().__init__(step, end)
        self.seen: dict[int, tuple[int, int, int]] = {}

    @property
    def used(self) -> bool:
        """True, so that every block passes its keys and values."""
        return True

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Return the keys and values unchanged."""
        self.seen[layer_idx] = (k.shape[1], k.shape[-1], v.shape[-1])
        return k, v


class _WrittenError(Exception):
    """Raised after a block's keys and values are written, to skip the rest of the block."""


class _AtFirstBlockError(Exception):
    """Raised when a forward pass reaches the first block; it carries the state."""

    def __init__(self, state: Tensor) -> None:
        self.state = state


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _AtFirstBlockError(next(iter(named(module, args, kwargs).values())))
