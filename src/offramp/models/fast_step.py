"""The native decoder's blocks for steps of a few tokens with a cache, without gradients.

The arithmetic is that of transformer.py; what differs is how long it takes. Queries, keys and
values are one product, and so are gate and up; the products read the weights as fast as the
memory gives them (fast_linear.py); the queries that share a key head stand together, so that
attention copies no keys; and what all blocks of a step share is computed once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from offramp.models.base import Step
from offramp.models.fast_linear import fast_linear, few_columns_pay, fuse, native_bfloat16
from offramp.models.kv_cache import KVCache

MOST_TOKENS = 16
"Tokens of a step up to which its fixed costs matter."


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """What one block multiplies by."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norms: tuple[Tensor, Tensor]
    read_from: tuple[tuple[dict[str, Any], Tensor, int], ...]
    "Of each parameter: where it is registered, itself, and its address."

    def current(self) -> bool:
        """No parameter was replaced or moved since."""
        return all(
            registered["weight"] is weight and weight.data_ptr() == address
            for registered, weight, address in self.read_from
        )


class FastSteps:
    """Runs blocks for a few tokens. It reads the blocks' own parameters and copies none."""

    def __init__(
        self, blocks: nn.ModuleList, *, eps: float, head_dim: int, kv_heads: int, post: bool
    ) -> None:
        self.blocks, self.eps, self.head_dim, self.kv_heads = blocks, eps, head_dim, kv_heads
        self.post = post
        self._weights: list[_Weights | None] = [None] * len(blocks)
        self._size = sum(p.numel() for block in blocks for p in block.parameters())
        self._vocabs: dict[int, tuple[Tensor, Tensor, tuple[int, int], Tensor]] = {}

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
        cos: Float[Tensor, "#B 1 T Dh"],
        sin: Float[Tensor, "#B 1 T Dh"],
        end: int,
    ) -> Float[Tensor, "B T D"]:
        """Blocks start+1 .. stop; keys stand at positions 0 .. end - 1."""
        assert step.cache is not None
        batch, tokens, width = h.shape
        x = h.reshape(-1, width)
        call = _Call(self, step, batch, tokens, cos, sin, end)
        with native_bfloat16(x, len(x)):
            for layer in range(start, stop):
                x = self._block(x, layer, self._of(layer), call)
        call.note_lengths(start, stop)
        return x.view(batch, tokens, width)

    def few_columns(self, weight: Tensor) -> bool:
        """Whether the form for few columns pays for this model's weights."""
        return few_columns_pay(weight, self._size * weight.element_size())

    def head(
        self,
        normalised: Float[Tensor, "B T D"],
        weight: Float[Tensor, "V D"],
        vocab: Int[Tensor, " W"] | None,
    ) -> Float[Tensor, "B T _"]:
        """Logits of a few tokens; ``vocab`` None: of all."""
        x = normalised.reshape(-1, normalised.shape[-1])
        if vocab is not None:
            weight = self._rows(weight, vocab)
        with native_bfloat16(x, len(x)):
            logits = fast_linear(x, weight, few_columns=self.few_columns(weight))
        return logits.contiguous().view(*normalised.shape[:2], -1)

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
        pay, shape = call.few_columns, x.shape[-1:]
        if self.post:
            x = x + fast_linear(call.attend(x, layer, of), of.out, few_columns=pay)
            x = F.rms_norm(x, shape, first, self.eps)
            return F.rms_norm(x + self._mlp(x, of, pay), shape, second, self.eps)
        attended = call.attend(F.rms_norm(x, shape, first, self.eps), layer, of)
        x = x + fast_linear(attended, of.out, few_columns=pay)
        return x + self._mlp(F.rms_norm(x, shape, second, self.eps), of, pay)

    def _mlp(self, x: Tensor, of: _Weights, pay: bool) -> Tensor:
        gate, up = fast_linear(x, of.gate_up, few_columns=pay).chunk(2, dim=-1)
        return fast_linear(F.silu(gate) * up, of.down, few_columns=pay)

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
            out=attention.o_proj.weight,
            gate_up=gate_up,
            down=mlp.down_proj.weight,
            norms=(norms[0].weight, norms[1].weight),
            read_from=tuple(
                (module._parameters, module.weight, module.weight.data_ptr()) for module in modules
            ),
        )


class _Call:
    """What the blocks of one call share."""

    def __init__(
        self,
        fast: FastSteps,
        step: Step,
        batch: int,
        tokens: int,
        cos: Tensor,
        sin: Tensor,
        end: int,
    ) -> None:
        assert step.cache is not None
        self.cache: KVCache = step.cache
        self.step, self.batch, self.tokens, self.end = step, batch, tokens, end
        self.head_dim, self.kv_heads = fast.head_dim, fast.kv_heads
        first: Any = fast.blocks[0]
        width: int = first.self_attn.q_proj.out_features
        self.few_columns = fast.few_columns(first.self_attn.q_proj.weight)
        self.cos = cos.transpose(1, 2).expand(batch, tokens, 1, -1).reshape(-1, 1, self.head_dim)
        self.sin = sin.transpose(1, 2).expand(batch, tokens, 1, -1).reshape(-1, 1, self.head_dim)
        self.groups = width // self.head_dim // self.kv_heads
        self.slots = step.positions.expand(batch, tokens)  # (B, T)
        self.one = batch == 1 and step.rows is None
        if not self.one:
            rows = torch.arange(batch) if step.rows is None else step.rows
            self.rows = rows[:, None]
        self.mask = None
        if batch * tokens > 1:
            seen = torch.arange(end) <= self.slots[..., None]  # (B, T, S)
            mask = torch.zeros(seen.shape, dtype=cos.dtype).masked_fill_(~seen, -torch.inf)
            self.mask = mask.repeat(1, self.groups, 1)[:, None]  # (B, 1, G T, S)

    def attend(self, x: Float[Tensor, "N D"], layer: int, of: _Weights) -> Float[Tensor, "N I"]:
        """Attention without its last product; writes the keys and values."""
        batch, tokens, half = self.batch, self.tokens, self.head_dim // 2
        qkv = fast_linear(x, of.qkv, few_columns=self.few_columns)
        heads = qkv.view(batch * tokens, -1, self.head_dim)  # (N, H + 2 H_kv, Dh)
        turning, v = heads[:, : -self.kv_heads], heads[:, -self.kv_heads :]
        swapped = torch.cat((turning[..., half:], turning[..., :half]), dim=-1)
        turned = torch.addcmul(turning * self.cos, swapped, self.sin)
        q, k = turned[:, : -self.kv_heads], turned[:, -self.kv_heads :]
        keys, values = self._store(layer, k, v)
        q = q.view(batch, tokens, self.kv_heads, self.groups, self.head_dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(batch, self.kv_heads, -1, self.head_dim)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
        out = out.view(batch, self.kv_heads, self.groups, tokens, self.head_dim)
        return out.permute(0, 3, 1, 2, 4).reshape(batch * tokens, -1)

    def _store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (N, H_kv, Dh) of each; returns (B, H_kv, S, Dh), all that the tokens may see."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.one:
            for store, new in ((keys[0], k), (values[0], v)):
                store.index_copy_(1, self.slots[0], new.transpose(0, 1))
        else:
            at = (self.rows, slice(None), self.slots)
            shape = (self.batch, self.tokens, self.kv_heads, self.head_dim)
            keys[at], values[at] = k.reshape(shape), v.reshape(shape)
            if self.step.rows is not None:
                keys, values = keys[self.step.rows], values[self.step.rows]
        return keys[:, :, : self.end], values[:, :, : self.end]

    def note_lengths(self, start: int, stop: int) -> None:
        """The cache holds these positions now."""
        lengths = self.cache.lengths[start:stop]
        if self.one:
            lengths.clamp_(min=self.end)
        else:
            rows, ends = self.rows[:, 0], self.slots.amax(dim=1) + 1
            lengths[:, rows] = torch.maximum(lengths[:, rows], ends)
