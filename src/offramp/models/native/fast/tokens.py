"""The data that all blocks share in one call for a few tokens; see steps.py."""

from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from offramp.models.base import Step
from offramp.models.checks import require_cache
from offramp.models.kv_cache import KVCache
from offramp.models.native.fast import kernels
from offramp.models.native.fast.kernel_weights import KernelWeights

Tables = tuple[Tensor, Tensor]
"""Cosines and sines (P, Dh) of the rotation at each position; the sines' first half is negated."""


class Call:
    """The data that all blocks share in one call. The step was checked: see ``checked_end``."""

    def __init__(
        self,
        step: Step,
        shape: torch.Size,
        *,
        end: int,
        tables: Tables,
        dtype: torch.dtype,
        head_dim: int,
        kv_heads: int,
    ) -> None:
        self.cache: KVCache = require_cache(step)
        self.end, self.dtype = end, dtype
        self.batch, self.tokens = shape
        self.head_dim, self.kv_heads = head_dim, kv_heads
        whole = step.positions.shape == shape
        self.slots = step.positions if whole else step.positions.expand(*shape)  # (B, T)
        self.chosen = step.rows
        self.one = self.batch == 1 and step.rows is None
        self.tables = tables

    @cached_property
    def rows(self) -> Int[Tensor, " B"]:
        """The row of the cache for each row of the call."""
        return torch.arange(self.batch) if self.chosen is None else self.chosen

    @cached_property
    def turns(self) -> Tables:
        """Cosines and sines of the tokens, (N, 1, Dh)."""
        flat = self.slots.reshape(-1)
        cos, sin = (table[flat][:, None].to(self.dtype) for table in self.tables)
        return cos, sin

    def attend(self, qkv: Float[Tensor, "N _"], layer: int, *, own: bool) -> Float[Tensor, "N I"]:
        """Attention without the output projection, to a layer of the cache.

        Writes the keys and values; without ``own`` ones there are only queries, (N, H Dh).
        """
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)  # (N, H + 2 H_kv, Dh)
        if own:
            turned = self._turned(heads[:, : -self.kv_heads])
            q, k = turned[:, : -self.kv_heads], turned[:, -self.kv_heads :]
            self._store(layer, k, heads[:, -self.kv_heads :])
        else:
            q = self._turned(heads)
        groups = q.shape[1] // self.kv_heads
        keys, values = self._seen(layer)
        q = q.view(self.batch, self.tokens, self.kv_heads, groups, self.head_dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(self.batch, self.kv_heads, -1, self.head_dim)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask(groups))
        out = out.view(self.batch, self.kv_heads, groups, self.tokens, self.head_dim)
        return out.permute(0, 3, 1, 2, 4).reshape(qkv.shape[0], -1)

    def store(self, kv: Float[Tensor, "N _"], layer: int) -> None:
        """Write only keys and values."""
        k, v = kv.view(kv.shape[0], 2, self.kv_heads, self.head_dim).unbind(1)
        self._store(layer, self._turned(k), v)

    def _turned(self, heads: Float[Tensor, "N H Dh"]) -> Float[Tensor, "N H Dh"]:
        half = self.head_dim // 2
        swapped = torch.cat((heads[..., half:], heads[..., :half]), dim=-1)
        cos, sin = self.turns
        return torch.addcmul(heads * cos, swapped, sin)

    def _mask(self, groups: int) -> Tensor | None:
        if self.batch * self.tokens == 1:
            return None
        if self._added is None:
            seen = torch.arange(self.end) <= self.slots[..., None]  # (B, T, S)
            added = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, -torch.inf)
            self._added = added.repeat(1, groups, 1)[:, None]  # (B, 1, G T, S)
        return self._added

    _added: Tensor | None = None

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write keys and values (N, H_kv, Dh)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.one:
            for store, new in ((keys[0], k), (values[0], v)):
                store.index_copy_(1, self.slots[0], new.transpose(0, 1))
        else:
            at = (self.rows[:, None], slice(None), self.slots)
            shape = (self.batch, self.tokens, self.kv_heads, self.head_dim)
            keys[at], values[at] = k.reshape(shape), v.reshape(shape)

    def _seen(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the tokens read, (B, H_kv, S, Dh)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.chosen is not None:
            keys, values = keys[self.rows], values[self.rows]
        return keys[:, :, : self.end], values[:, :, : self.end]

    def note_lengths(self, start: int, stop: int) -> None:
        """Set the lengths of the cache after blocks start+1 .. stop wrote keys and values."""
        lengths = self.cache.lengths[start:stop]
        if self.one:
            lengths.clamp_(min=self.end)
        else:
            ends = (self.slots.amax(dim=1) + 1).expand(len(lengths), -1)
            lengths.scatter_reduce_(1, self.rows.expand(len(lengths), -1), ends, "amax")


class KernelCall(Call):
    """A ``Call`` that uses the compiled kernels, which can also run whole blocks."""

    @cached_property
    def _at(self) -> kernels.CachedTokens:
        if self.one:
            rows = self._cache.first_row(self.tokens)
        else:
            rows = self.rows if self.tokens == 1 else self.rows.repeat_interleave(self.tokens)
        slots = self.slots.reshape(-1).contiguous()
        return kernels.CachedTokens(self._cache, slots=slots, rows=rows.contiguous(), checked=True)

    @property
    def _cache(self) -> kernels.KernelCache:
        """Return the cache in the form of the kernels, reused while its tensors are the same."""
        return kernel_cache(self.cache, self.tables)

    def blocks(
        self,
        x: Float[Tensor, "N D"],
        weights: KernelWeights,
        start: int,
        stop: int,
        *,
        kept: int,
    ) -> Float[Tensor, "N D"]:
        """Run blocks start+1 .. stop in one call: see ``CachedTokens.blocks``."""
        return self._at.blocks(x, weights, start, stop, kept=kept)

    def attend(self, qkv: Float[Tensor, "N _"], layer: int, *, own: bool) -> Float[Tensor, "N I"]:
        """Attention without the output projection: see ``CachedTokens.attend``."""
        return self._at.attend(qkv.float(), layer, own=own)

    def store(self, kv: Float[Tensor, "N _"], layer: int) -> None:
        """Write only keys and values."""
        self.attend(kv, layer, own=True)

    def note_lengths(self, start: int, stop: int) -> None:
        """Do nothing, because the kernels set the lengths."""


def kernel_cache(cache: KVCache, tables: Tables) -> kernels.KernelCache:
    """Return the cache in the form of the kernels, reused while its tensors are the same."""
    tensors = (cache.keys, cache.values, cache.lengths, *tables)
    kept: kernels.KernelCache | None = cache.memo.get(kernels.KernelCache)
    if kept is None or not kept.holds(tensors):
        kept = cache.memo[kernels.KernelCache] = kernels.KernelCache(*tensors)
    return kept


def is_text(h: Float[Tensor, "B T D"], step: Step) -> bool:
    """Return whether the tokens are those of one row, at consecutive positions."""
    key = is_text, h.shape[:2]
    found: bool | None = step.memo.get(key)
    if found is None:
        one = h.shape[0] == 1 and step.positions.shape == h.shape[:2]
        found = one and bool((step.positions.diff() == 1).all())
        step.memo[key] = found
    return found


class WideTables:
    """Tables in float32, which are kept for the next token."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def of(self, tables: Tables) -> Tables:
        """Return the tables in float32."""
        if tables[0].dtype == torch.float32:
            return tables
        kept = self._kept
        if kept is None or kept[0] is not tables[0] or kept[1] is not tables[1]:
            cos, sin = (table.float() for table in tables)
            kept = self._kept = (*tables, cos, sin)
        return kept[2], kept[3]
