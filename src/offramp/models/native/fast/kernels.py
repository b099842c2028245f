"""Matrix products and attention of a few tokens by the compiled kernels, if they were built.

``_few_tokens.c`` is compiled when offramp is installed, if there is a C compiler with OpenMP.
Without it, ``steps.py`` computes the same with PyTorch, more slowly.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from offramp.models.base import FEW_TOKENS

try:
    from offramp.models.native.fast import _few_tokens as _compiled
except ImportError:
    _compiled = None  # type: ignore[assignment]

DTYPES = (torch.float32, torch.bfloat16)
"""Precisions of weights and of the cache that the kernels read."""
_LANES, _LARGEST_HEAD = 8, 256  # as in _few_tokens.c
_AS_IT_IS, _NORMALISED, _GATED = range(3)


def kernels_fit(weight: Tensor, head_dim: int) -> bool:
    """Return whether there are kernels for these weights, on a CPU."""
    return (
        _compiled is not None
        and weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and weight.is_contiguous()
        and head_dim % _LANES == 0
        and head_dim <= _LARGEST_HEAD
    )


def linear(
    x: Float[Tensor, "N _"],
    weight: Float[Tensor, "O I"],
    *,
    norm: Float[Tensor, " I"] | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Float[Tensor, "N O"] | None = None,
) -> Float[Tensor, "N O"]:
    """Return f(x) weight^T + residual in float32; a token's result is independent of the others.

    f is RMSNorm if there is a ``norm``; if ``gated``, x is (N, 2 I) and f is SiLU of its first
    half times the second half.
    """
    x = x.contiguous()
    outputs, inputs = weight.shape
    tokens = x.shape[0]
    assert weight.is_contiguous()
    assert x.dtype == torch.float32
    assert x.shape[1] == inputs * (1 + gated)
    if norm is not None:
        norm = norm.to(weight.dtype).contiguous()
        assert norm.shape[0] == inputs
    if residual is not None:
        residual = residual.contiguous()
        assert residual.dtype == torch.float32
        assert residual.shape == (tokens, outputs)
    before = _GATED if gated else _AS_IT_IS if norm is None else _NORMALISED
    out = torch.empty(tokens, outputs, dtype=torch.float32)
    scratch = None if before == _AS_IT_IS else torch.empty(tokens, inputs, dtype=torch.float32)
    _compiled.linear(
        x.data_ptr(),
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        out.data_ptr(),
        tokens,
        inputs,
        outputs,
        before,
        0 if norm is None else norm.data_ptr(),
        eps,
        0 if residual is None else residual.data_ptr(),
        0 if scratch is None else scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The sizes of the blocks of a model."""

    hidden: int
    heads: int
    units: int
    "Hidden units of the SwiGLU."
    eps: float
    post: bool
    "Whether the norms are after the sublayers."


class KernelCache:
    """A cache and its rotations in the form of the kernels, checked once and used for all tokens.

    ``keys`` and ``values`` are the caches of all blocks, and ``lengths`` counts the positions that
    are written, for each block and row. ``cos`` and ``sin`` (whose first half is negated) are the
    rotations at each position.
    """

    def __init__(
        self,
        keys: Float[Tensor, "L R H C Dh"],
        values: Float[Tensor, "L R H C Dh"],
        lengths: Int[Tensor, "L R"],
        cos: Float[Tensor, "P Dh"],
        sin: Float[Tensor, "P Dh"],
    ) -> None:
        self.blocks, self.rows, self.kv_heads, self.capacity, self.size = keys.shape
        assert keys.shape == values.shape
        assert keys.dtype == values.dtype
        assert keys.dtype in DTYPES
        assert cos.dtype == sin.dtype == torch.float32
        assert cos.shape == sin.shape
        assert cos.shape[1] == self.size
        assert lengths.shape == keys.shape[:2]
        assert lengths.dtype == torch.long
        self._held = (keys, values, lengths, cos, sin)
        assert all(each.is_contiguous() for each in self._held)
        self.bfloat16 = keys.dtype == torch.bfloat16
        addresses = [each.data_ptr() for each in self._held]
        self.keys_at, self.values_at, self.lengths_at, self.cos_at, self.sin_at = addresses
        self.layer = keys.stride(0) * keys.element_size()
        self.first_row = torch.zeros(FEW_TOKENS, dtype=torch.long)
        self._threads, self._scores = 0, torch.empty(0)

    def holds(self, tensors: tuple[Tensor, ...]) -> bool:
        """Return whether it was made from these tensors."""
        return all(mine is theirs for mine, theirs in zip(self._held, tensors, strict=True))

    def scores(self, threads: int) -> int:
        """Return the address of a buffer for the attention scores of this many threads."""
        if self._threads < threads:
            self._threads, self._scores = threads, torch.empty(threads, self.capacity + _LANES)
        return self._scores.data_ptr()


class CachedTokens:
    """Some tokens and their places in a cache: ``slots`` are their positions in their rows."""

    def __init__(
        self, cache: KernelCache, *, slots: Int[Tensor, " N"], rows: Int[Tensor, " N"]
    ) -> None:
        self._cache, self._held = cache, (slots, rows)
        self.tokens = len(slots)
        assert slots.dtype == rows.dtype == torch.long
        assert len(rows) == self.tokens
        assert slots.is_contiguous()
        assert rows.is_contiguous()
        self._slots, self._of_rows = slots.data_ptr(), rows.data_ptr()
        self._threads = torch.get_num_threads()

    def blocks(
        self,
        x: Float[Tensor, "N D"],
        weights: Int[Tensor, "L 6"],
        shape: BlockShape,
        start: int,
        stop: int,
        *,
        kept: int = 0,
    ) -> Float[Tensor, "N D"]:
        """Run blocks start+1 .. stop in float32, rounded to the weights' precision after each.

        ``weights`` are the addresses of each block's fused queries, keys and values, its output,
        fused gate and up, down and two norms, all in the cache's precision. The first ``kept``
        tokens keep their state: only their keys and values are computed.
        """
        x = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        assert x.shape == (self.tokens, shape.hidden)
        cache = self._cache
        assert weights.shape == (cache.blocks, 6)
        assert weights.dtype == torch.long
        assert weights.is_contiguous()
        assert 0 <= kept <= self.tokens
        assert 0 <= start <= stop <= cache.blocks
        attended = shape.heads * cache.size
        each = 2 * attended + 2 * cache.kv_heads * cache.size + shape.hidden + 2 * shape.units
        room = torch.empty(self.tokens * (each + max(shape.hidden, shape.units)))
        _compiled.blocks(
            x.data_ptr(),
            weights.data_ptr() + 8 * 6 * start,
            stop - start,
            cache.bfloat16,
            shape.post,
            shape.eps,
            cache.cos_at,
            cache.sin_at,
            cache.keys_at + start * cache.layer,
            cache.values_at + start * cache.layer,
            cache.layer,
            cache.lengths_at + 8 * start * cache.rows,
            cache.rows,
            self._slots,
            self._of_rows,
            room.data_ptr(),
            cache.scores(self._threads),
            self.tokens,
            kept,
            shape.hidden,
            shape.units,
            shape.heads,
            cache.kv_heads,
            cache.size,
            cache.capacity,
            self._threads,
        )
        return x

    def attend(self, qkv: Float[Tensor, "N _"], layer: int) -> Float[Tensor, "N I"]:
        """Turn queries, keys and values (N, (H + 2 H_kv) Dh) into attended values (N, H Dh).

        Stores the keys and values of a layer (from 0) and attends to every slot up to the token's
        own. Without queries (H = 0) it only stores.
        """
        cache = self._cache
        heads = qkv.shape[1] // cache.size - 2 * cache.kv_heads
        assert qkv.is_contiguous()
        assert qkv.dtype == torch.float32
        assert len(qkv) == self.tokens
        out = qkv.new_empty(self.tokens, heads * cache.size)
        _compiled.attend(
            qkv.data_ptr(),
            cache.cos_at,
            cache.sin_at,
            cache.keys_at + layer * cache.layer,
            cache.values_at + layer * cache.layer,
            cache.lengths_at + 8 * layer * cache.rows,
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
        )
        return out
