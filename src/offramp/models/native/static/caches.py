"""Caches of the static steps, and the graphs that belong to their memory."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from offramp.models.kv_cache import KVCache
from offramp.models.native.fast.tokens import Tables
from offramp.models.native.fast.weights import Weights
from offramp.models.native.static.capture import Part
from offramp.models.native.static.inputs import Inputs
from offramp.models.native.static.segment import Memory

FEWEST_SLOTS = 256
"""Slots that a token reads at least. The capacity of a cache is a multiple of it."""
KEPT_BYTES = 1 << 28
"""Largest cache whose memory and graphs are kept for the next one."""


@dataclass(kw_only=True)
class OfCache:
    """The inputs and graphs of one cache, and the tensors to which they belong."""

    weights: Weights
    memory: Memory
    inputs: dict[Any, Inputs] = field(default_factory=dict)
    parts: dict[Any, Part] = field(default_factory=dict)

    def current(self, weights: Weights, cache: KVCache, tables: Tables) -> bool:
        """Return whether neither the weights nor the cache's tensors were replaced or moved."""
        held = self.memory
        return (
            self.weights is weights
            and held.keys is cache.keys
            and held.values is cache.values
            and held.lengths is cache.lengths
            and held.cos is tables[0]
            and held.sin is tables[1]
        )


class Caches:
    """Makes caches. The graphs of one that is no longer used serve the next one of its shape.

    A graph holds the addresses of its cache, and to capture it takes longer than to decode a few
    tokens. So the memory of the last cache that ended is kept, if it is small, until another cache
    is made. One of another shape frees it.
    """

    def __init__(self) -> None:
        self._idle: OfCache | None = None

    def new(self, batch_size: int, capacity: int, form: dict[str, Any]) -> KVCache:
        """Return an empty cache of this form, with at least this capacity."""
        idle, self._idle = self._idle, None
        capacity = -(-capacity // FEWEST_SLOTS) * FEWEST_SLOTS
        with torch.inference_mode(False):  # so that it can be written in every mode
            if idle is not None:
                held = idle.memory
                layers, rows, heads, slots, width = held.keys.shape
                shape = {"num_layers": layers, "num_heads": heads, "head_dim": width}
                alike = {**shape, "dtype": held.keys.dtype, "device": held.keys.device}
                if (rows, slots - 1) == (batch_size, capacity) and alike == form:
                    cache = KVCache.over(held.keys, held.values, held.lengths)
                    self.keep(cache, idle)
                    return cache
                del held, idle  # before the memory of another is needed
            return KVCache(batch_size=batch_size, capacity=capacity, **form)

    def keep(self, cache: KVCache, of: OfCache) -> None:
        """Keep the graphs with the cache, and when it ends for the next one."""
        cache.memo[OfCache] = of
        if cache.bytes <= KEPT_BYTES:
            weakref.finalize(cache, self._ended, of).atexit = False

    def _ended(self, of: OfCache) -> None:
        self._idle = of
