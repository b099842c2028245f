"""Keys and values of earlier tokens, stored for each layer.

A token's slot in the cache is its position in its own row. So padding is never stored, layers may
be filled at different times (the slots of a token that left early stay empty above its exit until
they are needed), and cropping changes only the lengths.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class KVCache:
    """Per-layer keys and values, (B, H, capacity, D) each, with per-layer, per-row lengths.

    ``lengths`` (L, B) counts the positions written in each layer and row. ``value_dim`` is the
    width of a value, if it is not that of a key (``head_dim``).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, batch_size, num_heads, capacity + 1)  # + 1: see write
        self.keys = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, value_dim or head_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(num_layers, batch_size, dtype=torch.long, device=device)
        self.capacity = capacity
        self.memo: dict[Any, Any] = {}  # values that a model derived from the cache, by kind

    def require(self, end: int) -> None:
        """Raise ValueError unless positions 0 .. end - 1 fit into the cache."""
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, got {end}")

    def write(
        self,
        layer: int,
        k: Float[Tensor, "B H T Dh"],
        v: Float[Tensor, "B H T Dv"],
        *,
        positions: Int[Tensor, "#B T"],
        real: Tensor | None = None,
        rows: Int[Tensor, " B"] | None = None,
    ) -> None:
        """Store the keys and values of these positions in a layer (counted from 0).

        Padding is written to a spare slot after the last position, which is never read.
        """
        batch = k.shape[0]
        if rows is None:
            rows = torch.arange(batch, device=k.device)
        slots = positions.expand(batch, -1)
        ends = slots.amax(dim=1) + 1
        if real is not None:
            ends = torch.where(real, slots + 1, 0).amax(dim=1)
            slots = torch.where(real, slots, self.capacity)
        self.keys[layer, rows[:, None], :, slots] = k.transpose(1, 2)
        self.values[layer, rows[:, None], :, slots] = v.transpose(1, 2)
        self.lengths[layer].scatter_reduce_(0, rows, ends, "amax")  # a row may occur twice

    def read(
        self, layer: int, *, end: int, rows: Int[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B H S Dh"], Float[Tensor, "B H S Dv"]]:
        """Return the keys and values of a layer at positions 0 .. end - 1."""
        k, v = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        return (k, v) if rows is None else (k[rows], v[rows])

    def crop(self, length: int) -> None:
        """Discard every position from ``length`` on, in every layer and row."""
        self.lengths.clamp_(max=length)
