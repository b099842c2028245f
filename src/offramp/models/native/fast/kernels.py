"""Matrix products and attention of a few tokens by the compiled kernels, if they were built.

``_few_tokens.c`` is compiled when offramp is installed, if there is a C compiler with OpenMP.
Without it, ``steps.py`` computes the same with PyTorch, more slowly.

The kernels read and write memory by address. So each function here checks the shapes, types and
places that it is given, and raises a ConfigError for those that would lead outside a tensor.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from offramp.errors import ConfigError
from offramp.models.base import FEW_TOKENS
from offramp.models.checks import about, check_tensor
from offramp.models.native.fast import products
from offramp.models.native.fast.kernel_weights import KernelWeights
from offramp.models.native.fast.products import (
    CPU,
    DTYPES,
    Weight,
    linear,
    multiplies_many,
    prepared,
)

try:
    from offramp.models.native.fast import _few_tokens as _compiled
except ImportError:
    _compiled = None  # type: ignore[assignment]

__all__ = ["CachedTokens", "KernelCache", "kernels_fit", "linear", "multiplies_many", "prepared"]

_LANES, _TOGETHER, _LARGEST_HEAD = 8, 2, 256  # as in _few_tokens.c, attention.h


def kernels_fit(weight: Weight, head_dim: int) -> bool:
    """Return whether there are kernels for these weights and heads of this size, on a CPU."""
    return (
        _compiled is not None
        and products.kernels_fit(weight)
        and head_dim % _LANES == 0
        and head_dim <= _LARGEST_HEAD
    )


class KernelCache:
    """A cache and its rotations in the form of the kernels, checked once and used for all tokens.

    ``keys`` and ``values`` are those of all layers of the cache, and ``lengths`` counts the
    positions that are written, for each layer and row. ``cos`` and ``sin`` (whose first half is
    negated) are the rotations at each position.
    """

    def __init__(
        self,
        keys: Float[Tensor, "L R H C Dh"],
        values: Float[Tensor, "L R H C Dh"],
        lengths: Int[Tensor, "L R"],
        cos: Float[Tensor, "P Dh"],
        sin: Float[Tensor, "P Dh"],
    ) -> None:
        if keys.dim() != 5 or keys.dtype not in DTYPES or 0 in keys.shape:
            raise ConfigError(f"keys: expected (L, R, H, C, Dh) in float32, got {about(keys)}")
        self.layers, self.rows, self.kv_heads, self.capacity, self.size = keys.shape
        if self.size % _LANES or self.size > _LARGEST_HEAD:
            raise ConfigError(f"head_dim: expected a multiple of {_LANES}, got {self.size}")
        self.positions = len(cos) if cos.dim() else 0
        for name, tensor, shape, dtype in (
            ("keys", keys, keys.shape, keys.dtype),
            ("values", values, keys.shape, keys.dtype),
            ("lengths", lengths, keys.shape[:2], torch.long),
            ("cos", cos, (self.positions, self.size), torch.float32),
            ("sin", sin, (self.positions, self.size), torch.float32),
        ):
            check_tensor(name, tensor, shape, dtype, CPU, contiguous=True)
        self._held = (keys, values, lengths, cos, sin)
        self.weights: KernelWeights | None = None  # those that fit, when they were last used
        self.dtype = keys.dtype
        self.bfloat16 = keys.dtype == torch.bfloat16
        addresses = [each.data_ptr() for each in self._held]
        self.keys_at, self.values_at, self.lengths_at, self.cos_at, self.sin_at = addresses
        self.layer_bytes = keys.stride(0) * keys.element_size()
        self._first_row = torch.zeros(FEW_TOKENS, dtype=torch.long)
        self._threads, self._scores = 0, torch.empty(0)

    def holds(self, tensors: tuple[Tensor, ...]) -> bool:
        """Return whether it was made from these tensors, and they are still in their places."""
        keys, values, lengths, _, _ = tensors
        return (
            all(mine is theirs for mine, theirs in zip(self._held, tensors, strict=True))
            and keys.data_ptr() == self.keys_at
            and values.data_ptr() == self.values_at
            and lengths.data_ptr() == self.lengths_at
        )

    def require(self, weights: KernelWeights) -> None:
        """Raise a ConfigError unless the weights are those of the model that made the cache."""
        got = (weights.cache_layers, weights.kv_heads, weights.size, weights.dtype)
        if got != (self.layers, self.kv_heads, self.size, self.dtype):
            raise ConfigError(
                "weights: expected those of the model that made the cache, "
                f"({self.layers} layers, {self.kv_heads} heads of {self.size}, {self.dtype}), "
                f"got ({got[0]} layers, {got[1]} heads of {got[2]}, {got[3]})"
            )
        self.weights = weights

    def at(self, layer: int) -> tuple[int, int, int]:
        """Return the addresses of a layer's keys, values and lengths."""
        skipped = layer * self.layer_bytes
        lengths_at = self.lengths_at + 8 * layer * self.rows
        return self.keys_at + skipped, self.values_at + skipped, lengths_at

    def first_row(self, tokens: int) -> Int[Tensor, " N"]:
        """Return the row of each of so many tokens of the first row."""
        if len(self._first_row) < tokens:
            self._first_row = torch.zeros(tokens, dtype=torch.long)
        return self._first_row[:tokens]

    def scores(self, threads: int) -> int:
        """Return the address of a buffer for the attention scores of this many threads."""
        if self._threads < threads:
            self._threads, self._scores = (
                threads,
                torch.empty(threads, _TOGETHER * (self.capacity + _LANES)),
            )
        return self._scores.data_ptr()


class CachedTokens:
    """Some tokens and their places in a cache: ``slots`` are their positions in their rows.

    Raises a ConfigError for a place that the cache does not have, unless the places are
    ``checked`` already.
    """

    def __init__(
        self,
        cache: KernelCache,
        *,
        slots: Int[Tensor, " N"],
        rows: Int[Tensor, " N"],
        checked: bool = False,
    ) -> None:
        self._cache, self._held = cache, (slots, rows)
        self.tokens = slots.shape[0] if slots.dim() else 0
        if not checked:
            _check_places("slots", slots, self.tokens, min(cache.capacity, cache.positions))
            _check_places("rows", rows, self.tokens, cache.rows)
        self._slots, self._of_rows = slots.data_ptr(), rows.data_ptr()
        self._threads = torch.get_num_threads()

    def blocks(
        self,
        x: Float[Tensor, "N D"],
        weights: KernelWeights,
        start: int,
        stop: int,
        *,
        kept: int = 0,
    ) -> Float[Tensor, "N D"]:
        """Run blocks start+1 .. stop in float32, rounded to the weights' precision after each.

        ``weights`` are in the cache's precision. The first ``kept`` tokens keep their state: only
        their keys and values are computed. Blocks without keys and values of their own attend to
        those in the last layer of the cache.
        """
        cache = self._cache
        if cache.weights is not weights:
            cache.require(weights)
        if not (0 <= start <= stop <= weights.count and 0 <= kept <= self.tokens):
            raise ConfigError(
                f"layers: expected a part of 0 to {weights.count} and at most {self.tokens} kept "
                f"tokens, got {start} to {stop} and {kept}"
            )
        if x.shape != (self.tokens, weights.hidden) or not x.is_cpu:
            check_tensor("x", x, (self.tokens, weights.hidden), x.dtype, CPU)
        x = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        room = torch.empty(self.tokens * weights.room)
        keys_at, values_at, lengths_at = cache.at(min(start, cache.layers - 1))
        _compiled.blocks(
            x.data_ptr(),
            weights.at(start),
            stop - start,
            weights.format,
            cache.bfloat16,
            weights.post,
            weights.eps,
            cache.cos_at,
            cache.sin_at,
            keys_at,
            values_at,
            cache.layer_bytes,
            lengths_at,
            cache.rows,
            self._slots,
            self._of_rows,
            room.data_ptr(),
            cache.scores(self._threads),
            self.tokens,
            kept,
            weights.hidden,
            weights.units,
            weights.heads,
            cache.kv_heads,
            cache.size,
            cache.capacity,
            self._threads,
            max(0, min(stop, cache.layers) - start),
            weights.upper_units,
        )
        return x

    def attend(
        self, qkv: Float[Tensor, "N _"], layer: int, *, own: bool = True
    ) -> Float[Tensor, "N I"]:
        """Turn queries, keys and values (N, (H + 2 H_kv) Dh) into attended values (N, H Dh).

        Stores the keys and values in a layer of the cache (from 0) and attends to every slot up to
        the token's own. Without queries (H = 0) it only stores. Without ``own`` keys and values
        there are only queries (N, H Dh), and it only attends.
        """
        cache = self._cache
        kept = 2 * cache.kv_heads if own else 0
        heads = qkv.shape[-1] // cache.size - kept
        if heads < 0 or heads % cache.kv_heads or not 0 <= layer < cache.layers:
            raise ConfigError(
                f"qkv: expected heads in groups of one size at a layer below {cache.layers}, got "
                f"{about(qkv)} at {layer}"
            )
        inputs = (heads + kept) * cache.size
        check_tensor("qkv", qkv, (self.tokens, inputs), torch.float32, CPU, contiguous=True)
        out = qkv.new_empty(self.tokens, heads * cache.size)
        _compiled.attend(
            qkv.data_ptr(),
            cache.cos_at,
            cache.sin_at,
            *cache.at(layer),
            cache.bfloat16,
            self._slots,
            self._of_rows,
            out.data_ptr(),
            cache.scores(self._threads),
            self.tokens,
            heads,
            cache.kv_heads,
            cache.size,
            cache.capacity,
            self._threads,
            own,
        )
        return out


def _check_places(name: str, places: Tensor, tokens: int, held: int) -> None:
    """Raise a ConfigError unless these are ``tokens`` numbers from 0 to ``held`` - 1."""
    check_tensor(name, places, (tokens,), torch.long, CPU, contiguous=True)
    for place in places.tolist():
        if not 0 <= place < held:
            raise ConfigError(f"{name}: expected from 0 to {held - 1}, got {place}")
