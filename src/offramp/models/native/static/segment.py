"""Blocks for a few tokens in fixed shapes: nothing here depends on a number of the device.

The arithmetic is that of blocks.py. A token reads the slots up to its own of the first ``end`` ones
of its row. Slots after the last token of a row may hold anything, also numbers that are not finite,
so their keys and values are replaced by 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from offramp.models.native.fast.weights import WeightsOfBlock
from offramp.models.native.static.inputs import Inputs

_ALIGNED = 8
"""The attention kernels of a GPU want a mask whose rows begin at multiples of this."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What all blocks have in common."""

    eps: float
    head_dim: int
    kv_heads: int
    post: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """The tensors of a cache, and the tables of the rotary positions."""

    keys: Float[Tensor, "L R H C Dh"]
    values: Float[Tensor, "L R H C Dh"]
    lengths: Tensor
    cos: Float[Tensor, "P Dh"]
    sin: Float[Tensor, "P Dh"]


class Segment:
    """Some blocks, for the tokens in ``inputs``, which read the first ``end`` slots of a row.

    Slots and rows of the inputs that the cache does not have become the spare slot and the last
    row. So a wrong position gives wrong numbers, but leads to no memory outside its row.
    """

    def __init__(
        self, inputs: Inputs, memory: Memory, form: Form, *, end: int, whole: bool
    ) -> None:
        self.form, self.memory, self.whole, self.end = form, memory, whole, end
        _, held, _, slots, _ = memory.keys.shape
        self.h = inputs.h
        self.batch, self.tokens = inputs.slots.shape
        spare = slots - 1
        self.slots = inputs.slots.clamp(0, spare)
        self.rows = inputs.rows.clamp(0, held - 1)
        self.active = inputs.active[..., None].flatten(0, 1)
        self.ends = ((self.slots + 1) * (self.slots < spare)).amax(dim=1)
        places = self.slots.flatten().clamp(max=len(memory.cos) - 1)
        dtype = self.h.dtype
        self.cos, self.sin = (
            table[places][:, None].to(dtype) for table in (memory.cos, memory.sin)
        )
        order = torch.arange(end, device=self.h.device)
        self.used = (order < self.ends[:, None])[:, None, :, None]  # (B, 1, S, 1)
        self.seen = order <= self.slots[..., None]  # (B, T, S)
        self.nothing = torch.zeros((), dtype=dtype, device=self.h.device)
        self._mask: Tensor | None = None

    def run(
        self, blocks: Sequence[WeightsOfBlock], start: int, stop: int, *, active: bool
    ) -> Float[Tensor, "B T D"]:
        """Return the states after blocks start+1 .. stop; some keep theirs, if ``active``."""
        x = self.h.flatten(0, 1)
        for layer in range(start, stop):
            new = self._block(x, layer, blocks[layer])
            x = torch.where(self.active, new, x) if active else new
        self._note_lengths(start, stop)
        return x.view(self.h.shape)

    def project_kv(self, blocks: Sequence[WeightsOfBlock], start: int, stop: int) -> None:
        """Write only keys and values of blocks start+1 .. stop, which all have their own."""
        x = self.h.flatten(0, 1)
        for layer in range(start, stop):
            of = blocks[layer]
            assert isinstance(of.kv, Tensor)
            kv = self._linear(self._before_attention(x, of), of.kv)
            k, v = kv.view(len(x), 2, self.form.kv_heads, self.form.head_dim).unbind(1)
            self._store(layer, self._turned(k), v)
        self._note_lengths(start, stop)

    def _block(self, x: Float[Tensor, "N D"], layer: int, of: WeightsOfBlock) -> Tensor:
        first, second = of.norms
        qkv = self._linear(self._before_attention(x, of), of.qkv)
        x = self._linear(self._attend(qkv, layer, own=of.kv is not None), of.out, residual=x)
        if self.form.post:
            x = self._normalised(x, first)
        inner = x if self.form.post else self._normalised(x, second)
        gate, up = self._linear(inner, of.gate_up).chunk(2, dim=-1)
        x = self._linear(F.silu(gate) * up, of.down, residual=x)
        return self._normalised(x, second) if self.form.post else x

    def _before_attention(self, x: Tensor, of: WeightsOfBlock) -> Tensor:
        return x if self.form.post else self._normalised(x, of.norms[0])

    def _attend(self, qkv: Float[Tensor, "N _"], layer: int, *, own: bool) -> Tensor:
        """Attention without the output projection; writes the block's ``own`` keys and values."""
        size, kv_heads = self.form.head_dim, self.form.kv_heads
        heads = qkv.view(len(qkv), -1, size)  # (N, H + 2 H_kv, Dh)
        if own:
            turned = self._turned(heads[:, :-kv_heads])
            q = turned[:, :-kv_heads]
            self._store(layer, turned[:, -kv_heads:], heads[:, -kv_heads:])
        else:
            q = self._turned(heads)
        groups = q.shape[1] // kv_heads
        place = min(layer, len(self.memory.keys) - 1)
        keys, values = (
            self._read(tensor[place]) for tensor in (self.memory.keys, self.memory.values)
        )
        q = q.reshape(self.batch, self.tokens, kv_heads, groups, size).permute(0, 2, 3, 1, 4)
        q = q.reshape(self.batch, kv_heads, groups * self.tokens, size)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._added(groups))
        out = out.view(self.batch, kv_heads, groups, self.tokens, size).permute(0, 3, 1, 2, 4)
        return out.reshape(len(qkv), -1)

    def _read(self, stored: Float[Tensor, "R H C Dh"]) -> Float[Tensor, "B H S Dh"]:
        found = stored[:, :, : self.end]
        if not self.whole:
            found = found[self.rows]
        return torch.where(self.used, found, self.nothing)

    def _store(self, layer: int, k: Float[Tensor, "N H Dh"], v: Float[Tensor, "N H Dh"]) -> None:
        shape = (self.batch, self.tokens, *k.shape[1:])
        for tensor, new in ((self.memory.keys, k), (self.memory.values, v)):
            tensor[layer].transpose(1, 2)[self.rows[:, None], self.slots] = new.reshape(shape)

    def _added(self, groups: int) -> Float[Tensor, "B 1 GT S"]:
        """Return what is added to the scores: 0 where a token sees a slot, else minus infinity."""
        if self._mask is None:
            width = -(-self.end // _ALIGNED) * _ALIGNED
            shape = (self.batch, groups, self.tokens, width)
            mask = self.h.new_zeros(shape)[..., : self.end]
            mask.masked_fill_(~self.seen[:, None], -math.inf)
            self._mask = mask.flatten(1, 2)[:, None]
        return self._mask

    def _note_lengths(self, start: int, stop: int) -> None:
        lengths = self.memory.lengths[start:stop]
        if len(lengths):
            shape = (len(lengths), -1)
            lengths.scatter_reduce_(1, self.rows.expand(shape), self.ends.expand(shape), "amax")

    def _turned(self, heads: Float[Tensor, "N H Dh"]) -> Float[Tensor, "N H Dh"]:
        half = self.form.head_dim // 2
        swapped = torch.cat((heads[..., half:], heads[..., :half]), dim=-1)
        return torch.addcmul(heads * self.cos, swapped, self.sin)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.form.eps)

    @staticmethod
    def _linear(x: Tensor, weight: object, *, residual: Tensor | None = None) -> Tensor:
        assert isinstance(weight, Tensor)
        if residual is None:
            return F.linear(x, weight)
        return torch.addmm(residual, x, weight.t())
