"""The cache object that a Hugging Face model's blocks use during one call.

Attention layers of ``transformers`` pass their new keys and values to a cache object and attend
to the keys and values that it returns. ``StepCache`` is such an object: it writes to our
``KVCache`` at the step's positions and reads from it. If only keys and values are needed, it stops
the block right after the write. The cache has a layer for each block that writes.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from offramp.models.base import Step
from offramp.models.checks import require_cache

Shape = tuple[int, int, int]
"""Heads, width of a key and width of a value."""


def stored_shape(shapes: Mapping[int, Shape]) -> Shape:
    """Return the shape that a cache has for blocks of these shapes.

    If they differ, a cache holds the heads of a block side by side, as one wide head.
    """
    if len(set(shapes.values())) == 1:
        return next(iter(shapes.values()))
    keys = max(heads * key_dim for heads, key_dim, _ in shapes.values())
    values = max(heads * value_dim for heads, _, value_dim in shapes.values())
    return 1, keys, values


class StepCache:
    """The cache object that attention layers use during one call.

    ``shapes`` are those of the blocks that write. A block cannot give it further attributes.
    """

    __slots__ = ("block", "end", "leave", "shapes", "slots", "step", "wide")

    def __init__(
        self, step: Step, end: int, shapes: Mapping[int, Shape], *, leave: bool = False
    ) -> None:
        self.step, self.end, self.leave = step, end, leave
        self.shapes = shapes
        self.slots = {index: slot for slot, index in enumerate(sorted(shapes))}
        self.wide = len(set(shapes.values())) > 1
        self.block = 0
        "The block (from 0) that runs."

    @property
    def used(self) -> bool:
        """Whether this call has a cache."""
        return self.step.cache is not None

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write a block's new keys and values (B, H, T, Dh); return all of them up to the end."""
        cache, step = require_cache(self.step), self.step
        if self.wide:
            k, v = _one_head(k, cache.keys.shape[-1]), _one_head(v, cache.values.shape[-1])
        slot = self.slots[self.block]
        cache.write(slot, k, v, positions=step.positions, real=step.real, rows=step.rows)
        if self.leave:
            raise WrittenError
        return self.read(self.block)

    def read(self, block: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, H, S, Dh) that a block wrote, up to the end."""
        cache = require_cache(self.step)
        k, v = cache.read(self.slots[block], end=self.end, rows=self.step.rows)
        if self.wide:
            heads, key_dim, value_dim = self.shapes[block]
            k, v = _heads(k, heads, key_dim), _heads(v, heads, value_dim)
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens before those of the step."""
        return self.end - self.step.positions.shape[1]


def _one_head(x: Tensor, width: int) -> Tensor:
    """Return the heads (B, H, T, Dh) side by side as one of this width, (B, 1, T, width)."""
    x = x.transpose(1, 2).flatten(2)
    return F.pad(x, (0, width - x.shape[-1]))[:, None]


def _heads(x: Tensor, heads: int, width: int) -> Tensor:
    """Return the heads (B, H, S, Dh) of this width that one wide head holds, (B, 1, S, W)."""
    of_block: Tensor = x[:, 0, :, : heads * width].unflatten(-1, (heads, width))
    return of_block.transpose(1, 2)


class WrittenError(Exception):
    """Raised after a block's keys and values are written, to skip the rest of the block."""
