"""The native decoder's blocks for steps of a few tokens with a cache, without gradients.

The arithmetic is that of transformer.py; what differs is how long it takes. Queries, keys and
values are one product, and so are gate and up; the products read the weights as fast as the
memory gives them, by compiled kernels (kernels.py) or by the fastest form that PyTorch has
(fast_linear.py); and what all blocks of a step share is computed once.
"""

from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from offramp.models import kernels
from offramp.models.base import Step
from offramp.models.exit_heads import ExitHead
from offramp.models.fast_linear import fast_linear, few_columns_pay, fuse, native_bfloat16
from offramp.models.kv_cache import KVCache

MOST_TOKENS = 16
"Tokens of a step up to which its fixed costs matter."

Tables = tuple[Tensor, Tensor]
"""Cosines and sines (P, Dh) of the rotation at each position; the sines' first half is negated."""


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """What one block multiplies by."""

    qkv: Tensor
    kv: Tensor
    "The part of it that gives keys and values."
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norms: tuple[Tensor, Tensor]
    registers: tuple[dict[str, Any], ...]
    "Where the parameters are registered."
    parameters: tuple[Tensor, ...]
    "What was there."

    addresses: list[int]

    def current(self) -> bool:
        """No parameter was replaced or moved since."""
        now = [each["weight"] for each in self.registers]
        same = all(map(is_, now, self.parameters))
        return same and [weight.data_ptr() for weight in now] == self.addresses


class FastSteps:
    """Runs blocks for a few tokens. It reads the blocks' own parameters and copies none."""

    def __init__(
        self,
        blocks: nn.ModuleList,
        *,
        eps: float,
        head_dim: int,
        kv_heads: int,
        post: bool,
    ) -> None:
        self.blocks, self.eps, self.head_dim, self.kv_heads = blocks, eps, head_dim, kv_heads
        self.post = post
        self._weights: list[_Weights | None] = [None] * len(blocks)
        self._size = sum(p.numel() for block in blocks for p in block.parameters())
        self._vocabs: dict[int, tuple[Tensor, Tensor, tuple[int, int], Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks up its own parameters."""
        return {**vars(self), "_weights": [None] * len(self.blocks), "_vocabs": {}}

    @staticmethod
    def fit(h: Tensor) -> bool:
        """Whether these are few tokens, on a CPU and without gradients."""
        return (
            h.shape[0] * h.shape[1] <= MOST_TOKENS
            and h.device.type == "cpu"
            and not torch.is_grad_enabled()
        )

    def run(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        end: int,
        tables: Tables,
    ) -> Float[Tensor, "B T D"]:
        """Blocks start+1 .. stop; keys stand at positions 0 .. end - 1, which ``tables`` cover."""
        call = self._call(h, step, end, tables)
        x = h.reshape(-1, h.shape[-1])
        with native_bfloat16(x, x.shape[0]):
            for layer in range(start, stop):  # rounded at each, so a stop between two is no matter
                x = self._block(x.to(call.dtype), layer, self._of(layer), call).to(h.dtype)
        call.note_lengths(start, stop)
        return x.view(h.shape)

    def project_kv(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        end: int,
        tables: Tables,
    ) -> None:
        """Write only the keys and values of blocks start+1 .. stop."""
        call = self._call(h, step, end, tables)
        x = h.reshape(-1, h.shape[-1])
        with native_bfloat16(x, x.shape[0]):
            x = x.to(call.dtype)
            for layer in range(start, stop):
                of = self._of(layer)
                norm = None if self.post else of.norms[0]
                call.store(self._linear(x, of.kv, norm=norm), layer)
        call.note_lengths(start, stop)

    def logits(
        self,
        h: Float[Tensor, "B T D"],
        norm: nn.Module | ExitHead,
        weight: Float[Tensor, "V D"],
        vocab: Int[Tensor, " W"] | None,
    ) -> Float[Tensor, "B T _"]:
        """Logits of a few tokens by a norm, or an exit's own, and a head's weight.

        ``vocab`` None: of all tokens.
        """
        x = h.reshape(-1, h.shape[-1])
        if vocab is not None:
            weight = self._rows(weight, vocab)
        own = norm if isinstance(norm, ExitHead) else None
        adapter = None if own is None else own.adapter
        last = norm if own is None else own.norm
        if adapter is None and isinstance(last, nn.RMSNorm) and self._compiled(weight):
            eps = self.eps if last.eps is None else last.eps
            logits = kernels.linear(x.float(), weight, norm=last.weight, eps=eps)
            return logits.to(h.dtype).view(*h.shape[:2], -1)
        with native_bfloat16(x, x.shape[0]):
            x = self._normed(x, last).to(self._dtype(weight))
            if adapter is not None:
                read = self._linear(x, adapter.direct_proj.weight, residual=x)
                both = [
                    self._linear(x, part.weight) for part in (adapter.gate_proj, adapter.up_proj)
                ]
                x = self._linear(
                    torch.cat(both, 1), adapter.down_proj.weight, gated=True, residual=read
                )
            logits = self._linear(x, weight)
        return logits.to(h.dtype).view(*h.shape[:2], -1)

    def _linear(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        norm: Tensor | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """f(x) weight^T + residual, (N, I) -> (N, O): see ``kernels.linear``."""
        if self._compiled(weight):
            return kernels.linear(
                x, weight, norm=norm, eps=self.eps, gated=gated, residual=residual
            )
        if norm is not None:
            x = F.rms_norm(x, x.shape[-1:], norm, self.eps)
        elif gated:
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        pay = few_columns_pay(weight, self._size * weight.element_size())
        out = fast_linear(x, weight, few_columns=pay)
        return out if residual is None else residual + out

    def _compiled(self, weight: Tensor) -> bool:
        return kernels.kernels_fit(weight, self.head_dim)

    def _dtype(self, weight: Tensor) -> torch.dtype:
        """What states are computed in."""
        return torch.float32 if self._compiled(weight) else weight.dtype

    def _call(self, h: Tensor, step: Step, end: int, tables: Tables) -> "_Call":
        key = self, h.shape[:2], h.dtype
        call: _Call | None = step.memo.get(key)
        if call is None:
            first: Any = self.blocks[0]
            weight = first.self_attn.q_proj.weight
            kind = _KernelCall if self._compiled(weight) else _Call
            call = step.memo[key] = kind(self, step, h, end, tables, self._dtype(weight))
        return call

    def _rows(self, weight: Tensor, vocab: Tensor) -> Tensor:
        """``weight[vocab]``, kept for the next token."""
        current = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        kept = self._vocabs.get(id(weight))
        if kept and kept[0] is weight and kept[1] is vocab and kept[2] == current:
            return kept[3]
        rows = weight[vocab]
        self._vocabs[id(weight)] = weight, vocab, current, rows
        return rows

    def _block(self, x: Tensor, layer: int, of: _Weights, call: "_Call") -> Tensor:
        first, second = of.norms
        if self.post:
            attended = call.attend(self._linear(x, of.qkv), layer)
            x = self._normalised(self._linear(attended, of.out, residual=x), first)
            gate_up = self._linear(x, of.gate_up)
            return self._normalised(self._linear(gate_up, of.down, gated=True, residual=x), second)
        attended = call.attend(self._linear(x, of.qkv, norm=first), layer)
        x = self._linear(attended, of.out, residual=x)
        gate_up = self._linear(x, of.gate_up, norm=second)
        return self._linear(gate_up, of.down, gated=True, residual=x)

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What a final norm makes of states; post-norm models have none."""
        if not isinstance(norm, nn.RMSNorm):
            return cast(Tensor, norm(x))
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.eps)

    def _of(self, layer: int) -> _Weights:
        """A block's weights, read anew if the block's parameters are no longer those."""
        weights = self._weights[layer]
        if weights is None or not weights.current():
            weights = self._weights[layer] = self._read(self.blocks[layer])
        return weights

    def _read(self, block: Any) -> _Weights:
        attention, mlp = block.self_attn, block.mlp
        qkv = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up = fuse([mlp.gate_proj, mlp.up_proj])
        norms = (
            (block.post_attention_layernorm, block.post_feedforward_layernorm)
            if self.post
            else (block.input_layernorm, block.post_attention_layernorm)
        )
        modules = (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            *norms,
        )
        return _Weights(
            qkv=qkv,
            kv=qkv[attention.q_proj.out_features :],
            out=attention.o_proj.weight,
            gate_up=gate_up,
            down=mlp.down_proj.weight,
            norms=(norms[0].weight, norms[1].weight),
            registers=tuple(module._parameters for module in modules),
            parameters=tuple(module.weight for module in modules),
            addresses=[module.weight.data_ptr() for module in modules],
        )


class _Call:
    """What the blocks of one call share."""

    def __init__(
        self,
        fast: FastSteps,
        step: Step,
        h: Tensor,
        end: int,
        tables: Tables,
        dtype: torch.dtype,
    ) -> None:
        assert step.cache is not None
        self.cache: KVCache = step.cache
        self.end, self.dtype = end, dtype
        self.batch, self.tokens = h.shape[:2]
        self.head_dim, self.kv_heads = fast.head_dim, fast.kv_heads
        whole = step.positions.shape == h.shape[:2]
        self.slots = step.positions if whole else step.positions.expand(*h.shape[:2])  # (B, T)
        self.some = step.rows is not None
        most = self.batch if step.rows is None else int(step.rows.max()) + 1
        if most > self.cache.keys.shape[1]:
            raise ValueError(f"the cache holds {self.cache.keys.shape[1]} rows, got {most}")
        self.one = self.batch == 1 and not self.some
        self.rows = torch.arange(self.batch) if step.rows is None else step.rows
        cos, sin = tables
        flat = self.slots.reshape(-1)
        self.cos, self.sin = cos[flat], sin[flat]  # (N, Dh)
        if dtype != cos.dtype:
            self.cos, self.sin = self.cos.to(dtype), self.sin.to(dtype)

    def attend(self, qkv: Float[Tensor, "N _"], layer: int) -> Float[Tensor, "N I"]:
        """Attention without its last product; writes the keys and values."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)  # (N, H + 2 H_kv, Dh)
        groups = heads.shape[1] // self.kv_heads - 2
        turned = self._turned(heads[:, : -self.kv_heads])
        q, k = turned[:, : -self.kv_heads], turned[:, -self.kv_heads :]
        keys, values = self._store(layer, k, heads[:, -self.kv_heads :])
        q = q.view(self.batch, self.tokens, self.kv_heads, groups, self.head_dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(self.batch, self.kv_heads, -1, self.head_dim)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask(groups))
        out = out.view(self.batch, self.kv_heads, groups, self.tokens, self.head_dim)
        return out.permute(0, 3, 1, 2, 4).reshape(qkv.shape[0], -1)

    def store(self, kv: Float[Tensor, "N _"], layer: int) -> None:
        """Write keys and values alone."""
        k, v = kv.view(kv.shape[0], 2, self.kv_heads, self.head_dim).unbind(1)
        self._store(layer, self._turned(k), v)

    def _turned(self, heads: Float[Tensor, "N H Dh"]) -> Float[Tensor, "N H Dh"]:
        half = self.head_dim // 2
        swapped = torch.cat((heads[..., half:], heads[..., :half]), dim=-1)
        return torch.addcmul(heads * self.cos[:, None], swapped, self.sin[:, None])

    def _mask(self, groups: int) -> Tensor | None:
        if self.batch * self.tokens == 1:
            return None
        if self._added is None:
            seen = torch.arange(self.end) <= self.slots[..., None]  # (B, T, S)
            added = torch.zeros(seen.shape, dtype=self.cos.dtype).masked_fill_(~seen, -torch.inf)
            self._added = added.repeat(1, groups, 1)[:, None]  # (B, 1, G T, S)
        return self._added

    _added: Tensor | None = None

    def _store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (N, H_kv, Dh) of each; returns (B, H_kv, S, Dh), all that the tokens may see."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.one:
            for store, new in ((keys[0], k), (values[0], v)):
                store.index_copy_(1, self.slots[0], new.transpose(0, 1))
        else:
            at = (self.rows[:, None], slice(None), self.slots)
            shape = (self.batch, self.tokens, self.kv_heads, self.head_dim)
            keys[at], values[at] = k.reshape(shape), v.reshape(shape)
            if self.some:
                keys, values = keys[self.rows], values[self.rows]
        return keys[:, :, : self.end], values[:, :, : self.end]

    def note_lengths(self, start: int, stop: int) -> None:
        """The cache holds these positions now."""
        lengths = self.cache.lengths[start:stop]
        if self.one:
            lengths.clamp_(min=self.end)
        else:
            ends = (self.slots.amax(dim=1) + 1).expand(len(lengths), -1)
            lengths.scatter_reduce_(1, self.rows.expand(len(lengths), -1), ends, "amax")


class _KernelCall(_Call):
    """The same by the compiled kernels."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._attend = kernels.attention(
            cos=self.cos,
            sin=self.sin,
            slots=self.slots.reshape(-1),
            rows=self.rows if self.tokens == 1 else self.rows.repeat_interleave(self.tokens),
            capacity=self.cache.keys.shape[3],
            kv_heads=self.kv_heads,
        )

    def attend(self, qkv: Float[Tensor, "N _"], layer: int) -> Float[Tensor, "N I"]:
        """Attention without its last product; writes the keys and values."""
        return self._attend(qkv, self.cache.keys[layer], self.cache.values[layer])

    def store(self, kv: Float[Tensor, "N _"], layer: int) -> None:
        """Write keys and values alone."""
        self.attend(kv, layer)
