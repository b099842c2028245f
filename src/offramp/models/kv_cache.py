"""Keys and values of earlier tokens, stored for each layer.

A token's slot in the cache is its position in its own row. So padding is never stored, layers may
be filled at different times (the slots of a token that left early stay empty above its exit until
they are needed), and cropping changes only the lengths.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from offramp.errors import ConfigError


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
        if batch_size < 1 or capacity < 1:
            raise ConfigError(
                f"cache: expected at least 1 row and 1 position, got {batch_size} and {capacity}"
            )
        shape = (num_layers, batch_size, num_heads, capacity + 1)  # + 1: see write
        self.keys = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, value_dim or head_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(num_layers, batch_size, dtype=torch.long, device=device)
        self.memo: dict[Any, Any] = {}  # values that a model derived from the cache, by kind

    @classmethod
    def over(cls, keys: Tensor, values: Tensor, lengths: Tensor) -> "KVCache":
        """Return an empty cache in the memory of one that is no longer used."""
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.lengths = keys.zero_(), values.zero_(), lengths.zero_()
        cache.memo = {}
        return cache

    @property
    def capacity(self) -> int:
        """Number of positions that the cache can hold."""
        return self.keys.shape[3] - 1

    def require(self, end: int) -> None:
        """Raise a ConfigError unless positions 0 .. end - 1 fit into the cache."""
        if end > self.capacity:
            raise ConfigError(f"the cache holds {self.capacity} positions, got {end}")

    def known_to(self, owner: object) -> bool:
        """Return whether ``require_form`` passed for this owner and the tensors of now."""
        kept = self.memo.get("form")
        return kept is not None and (
            kept[0] is owner
            and kept[1] is self.keys
            and kept[2] is self.values
            and kept[3] is self.lengths
        )

    def require_form(
        self,
        owner: object,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raise a ConfigError unless a model of this form made the cache.

        ``owner`` stands for the model: for the same object the check need not be repeated.
        """
        expected = (num_layers, num_heads, head_dim, value_dim or head_dim, dtype, device)
        layers, rows, heads, _, key_dim = self.keys.shape
        alike = (
            self.values.shape[:4] == self.keys.shape[:4]
            and self.values.dtype == self.keys.dtype
            and self.lengths.shape == (layers, rows)
            and self.lengths.dtype == torch.long
            and self.keys.device == self.values.device == self.lengths.device
        )
        got = (layers, heads, key_dim, self.values.shape[-1], self.keys.dtype, self.keys.device)
        if got != expected or not alike:
            form = "({} layers, {} heads, widths {} and {}, {}, {})"
            raise ConfigError(
                f"cache: expected one that this model made, {form.format(*expected)}, got "
                f"{form.format(*got)}" + ("" if alike else " whose tensors do not fit together")
            )
        self.memo["form"] = (owner, self.keys, self.values, self.lengths)

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

    def crop(self, length: int, *, row: int | None = None) -> None:
        """Discard every position from ``length`` on, in every layer of one row, or of all rows."""
        if length < 0:
            raise ConfigError(f"length: expected at least 0, got {length}")
        lengths = self.lengths if row is None else self.lengths[:, self._checked(row)]
        lengths.clamp_(max=length)

    def clear(self, row: int) -> None:
        """Make a row as empty as in a new cache, so that another text can use it.

        Its keys and values become 0. A model that masks positions reads them all and multiplies
        the others by 0, which would keep a value that is not finite.
        """
        self._checked(row)
        self.keys[:, row].zero_()
        self.values[:, row].zero_()
        self.lengths[:, row].zero_()

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values; they stay the same while the cache is used."""
        return self.keys.nbytes + self.values.nbytes

    def _checked(self, row: int) -> int:
        rows = self.lengths.shape[1]
        if not 0 <= row < rows:
            raise ConfigError(f"rows: the cache holds {rows} rows, got row {row}")
        return row
