"""The native decoder's blocks for steps of a few tokens with a cache, without gradients.

The arithmetic is the same as in blocks.py; only the speed differs. Queries, keys and values are
one matrix product, and so are gate and up. The products use compiled kernels (kernels.py) or the
fastest form in PyTorch (linear.py). Data that all blocks of a step share is computed once
(tokens.py). Prompts run here, too, where the kernels compute the attention; their products are
those of PyTorch where these are better (``multiplies_many``).
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from offramp.models.base import FEW_TOKENS, Step
from offramp.models.checks import require_cache
from offramp.models.exit_heads import ExitHead
from offramp.models.native.fast import kernels
from offramp.models.native.fast.linear import (
    fast_linear,
    few_columns_pay,
    input_of,
    native_bfloat16,
)
from offramp.models.native.fast.products import DTYPES, Weight
from offramp.models.native.fast.tokens import (
    Call,
    KernelCall,
    Tables,
    WideTables,
    is_text,
)
from offramp.models.native.fast.weights import BlockWeights, RowsOf, WeightsOfBlock
from offramp.models.native.quantised import QuantisedWeight, quantised_linear


class FastSteps:
    """Runs blocks for a few tokens with the blocks' own parameters, without copies."""

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
        self.weights = BlockWeights(blocks, head_dim=head_dim, eps=eps, post=post)
        self.wide_tables = WideTables()
        self._size = sum(p.numel() for block in blocks for p in block.parameters())
        self.rows = RowsOf()

    def __getstate__(self) -> dict[str, Any]:
        """Drop all values that were computed from the parameters; a copy computes its own."""
        return {**vars(self), "rows": RowsOf(), "wide_tables": WideTables()}

    @staticmethod
    def fit(h: Tensor) -> bool:
        """Return whether ``h`` (B, T, D) has few tokens, on a CPU and without gradients."""
        few = h.shape[0] * h.shape[1] <= FEW_TOKENS
        return few and h.is_cpu and not torch.is_grad_enabled()

    def fit_text(self, h: Tensor, step: Step) -> bool:
        """Return whether ``h`` has many tokens whose attention the kernels compute, as a prompt."""
        if not h.is_cpu or torch.is_grad_enabled() or not self.weights.kernels_read:
            return False
        weight = cast(Any, self.blocks[0]).self_attn.q_proj.weight
        return self._compiled(weight) and is_text(h, step)

    def run(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        end: int,
        tables: Tables,
        active: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run blocks start+1 .. stop. Keys are at positions 0 .. end - 1, which ``tables`` cover.

        Tokens that are not ``active`` keep their state; their keys and values are computed in the
        same product as those of the others, so the weights are read only once.
        """
        x = h.reshape(-1, h.shape[-1])
        if active is not None:
            return self._run_some(x, start, stop, step, end, tables, active).view(h.shape)
        call = self._call(h.shape[:2], h.dtype, step, end, tables)
        if (whole := self._run_whole(call, x, start, stop)) is not None:
            return whole.view(h.shape)
        blocks = self.weights.of(call.cache).blocks
        with native_bfloat16(x, x.shape[0]):
            for layer in range(start, stop):  # rounded after each, because a call may stop at any
                x = self._block(x.to(call.dtype), layer, blocks[layer], call).to(h.dtype)
        call.note_lengths(start, stop)
        return x.view(h.shape)

    def _run_whole(
        self, call: Call, x: Float[Tensor, "N D"], start: int, stop: int, *, kept: int = 0
    ) -> Float[Tensor, "N D"] | None:
        """Run all blocks in one call of the kernels; None if the kernels cannot run them.

        See ``CachedTokens.blocks``.
        """
        weights = self.weights.of(call.cache).kernel
        if not isinstance(call, KernelCall) or weights is None:
            return None
        if not self._by_kernels(self.weights.of(call.cache).blocks[0].qkv, x.shape[0]):
            return None
        if weights.dtype != call.cache.keys.dtype:
            return None
        return call.blocks(x, weights, start, stop, kept=kept).to(x.dtype)

    def fills_beside(self, tokens: int) -> bool:
        """Return whether ``run`` computes keys and values of inactive tokens in the same product.

        ``tokens`` is the number of all tokens of the call.
        """
        return tokens <= FEW_TOKENS and self.weights.kernels_read

    def _run_some(
        self,
        x: Float[Tensor, "N D"],
        start: int,
        stop: int,
        step: Step,
        end: int,
        tables: Tables,
        active: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "N D"]:
        """Run blocks for ``active`` tokens; for the others write only keys and values."""
        running = active.flatten().tolist()
        kept = running.count(False)
        h = x.view(*active.shape, -1)
        if kept == 0:
            return self.run(h, start, stop, step=step, end=end, tables=tables).view(x.shape)
        if kept == len(running):
            self.project_kv(h, start, stop, step=step, end=end, tables=tables)
            return x
        if not any(running[:kept]):
            call = self._call(active.shape, x.dtype, step, end, tables)
            if (whole := self._run_whole(call, x, start, stop, kept=kept)) is not None:
                return whole
        places = step.positions.expand(active.shape).flatten()
        rows = torch.arange(active.shape[0]) if step.rows is None else step.rows
        rows = rows[:, None].expand(active.shape).flatten()

        def at(part: Tensor) -> dict[str, Any]:
            step_there = Step(positions=places[part, None], cache=step.cache, rows=rows[part])
            return {"step": step_there, "end": int(places[part].max()) + 1, "tables": tables}

        done, running_on = (part.flatten().nonzero()[:, 0] for part in (~active, active))
        self.project_kv(x[done, None], start, stop, **at(done))
        out = self.run(x[running_on, None], start, stop, **at(running_on))
        return x.index_copy(0, running_on, out[:, 0])

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
        """Write only the keys and values of blocks start+1 .. stop that have their own."""
        call = self._call(h.shape[:2], h.dtype, step, end, tables)
        x = h.reshape(-1, h.shape[-1])
        with native_bfloat16(x, x.shape[0]):
            x = x.to(call.dtype)
            for layer, of in enumerate(self.weights.of(call.cache).blocks[start:stop], start):
                if of.kv is None:
                    break
                norm = None if self.post else of.norms[0]
                call.store(self._linear(x, of.kv, norm=norm), layer)
        call.note_lengths(start, stop)

    def logits(
        self,
        h: Float[Tensor, "B T D"],
        norm: nn.Module | ExitHead,
        weight: Weight,
        vocab: Int[Tensor, " W"] | None,
    ) -> Float[Tensor, "B T _"]:
        """Return the logits, by a norm or exit head, of the tokens in ``vocab`` (None: all)."""
        x = h.reshape(-1, h.shape[-1])
        if vocab is not None:
            weight = self.rows.of(weight, vocab)
        last = norm.norm if isinstance(norm, ExitHead) else norm
        adapted = isinstance(norm, ExitHead) and norm.adapter is not None
        if not adapted and isinstance(last, nn.RMSNorm) and self._compiled(weight):
            eps = self.eps if last.eps is None else last.eps
            logits = kernels.linear(x.float(), weight, norm=last.weight, eps=eps)
        else:
            with native_bfloat16(x, x.shape[0]):
                logits = self._linear(self.head_input(x, norm, weight), weight)
        return logits.to(h.dtype).view(*h.shape[:2], -1)

    def head_input(
        self, x: Float[Tensor, "N D"], norm: nn.Module | ExitHead, weight: Weight
    ) -> Float[Tensor, "N D"]:
        """Return what the LM head with this weight reads: states after a norm or an exit head."""
        own = norm if isinstance(norm, ExitHead) else None
        x = self._normed(x, norm if own is None else own.norm).to(self._dtype(weight, x))
        if own is None or own.adapter is None:
            return x
        adapter, direct = own.adapter, own.adapter.direct_proj
        read = x if direct is None else self._linear(x, direct.weight, residual=x)
        both = [self._linear(x, part.weight) for part in (adapter.gate_proj, adapter.up_proj)]
        x = torch.cat(both, 1)
        return self._linear(x, adapter.down_proj.weight, gated=True, residual=read)

    def _linear(
        self,
        x: Tensor,
        weight: Weight,
        *,
        norm: Tensor | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return f(x) weight^T + residual, (N, O), for x (N, I); see ``kernels.linear``."""
        if self._by_kernels(weight, x.shape[0]):
            return kernels.linear(
                x, weight, norm=norm, eps=self.eps, gated=gated, residual=residual
            )
        if isinstance(weight, Tensor) and self._compiled(weight) and (gated or norm is not None):
            x = kernels.prepared(x, weight.dtype, norm=norm, eps=self.eps)
        else:
            x = input_of(x, norm=norm, eps=self.eps, gated=gated)
        if isinstance(weight, QuantisedWeight):
            out = quantised_linear(x, weight)
        else:
            pay = few_columns_pay(weight, self._size * weight.element_size())
            out = fast_linear(x.to(weight.dtype), weight, few_columns=pay)
        return out if residual is None else residual + out

    def _by_kernels(self, weight: Weight, tokens: int) -> bool:
        """Return whether the kernels multiply this weight with so many tokens."""
        return self._compiled(weight) and (tokens <= FEW_TOKENS or kernels.multiplies_many(weight))

    def _compiled(self, weight: Weight) -> bool:
        return kernels.kernels_fit(weight, self.head_dim)

    def _dtype(self, weight: Weight, states: Tensor) -> torch.dtype:
        """Return the precision in which states are computed."""
        if self._compiled(weight):
            return torch.float32
        return states.dtype if isinstance(weight, QuantisedWeight) else weight.dtype

    def _call(
        self, shape: torch.Size, dtype: torch.dtype, step: Step, end: int, tables: Tables
    ) -> Call:
        key = self, shape, dtype
        call: Call | None = step.memo.get(key)
        if call is None:
            cache = require_cache(step)
            weight = cast(Any, self.blocks[0]).self_attn.q_proj.weight
            about = {"end": end, "head_dim": self.head_dim, "kv_heads": self.kv_heads}
            if self._compiled(weight) and cache.keys.dtype in DTYPES:
                call = KernelCall(
                    step, shape, tables=self.wide_tables.of(tables), dtype=torch.float32, **about
                )
            else:
                quantised = isinstance(weight, QuantisedWeight)
                own = cache.keys.dtype if quantised else weight.dtype
                call = Call(step, shape, tables=tables, dtype=own, **about)
            step.memo[key] = call
        return call

    def _block(self, x: Tensor, layer: int, of: WeightsOfBlock, call: Call) -> Tensor:
        first, second = of.norms
        qkv = self._linear(x, of.qkv, norm=None if self.post else first)
        place = min(layer, len(call.cache.keys) - 1)
        seen = call.attend(qkv, place, own=of.kv is not None)
        x = self._linear(seen, of.out, residual=x)
        if self.post:
            x = self._normalised(x, first)
            gate_up = self._linear(x, of.gate_up)
            return self._normalised(self._linear(gate_up, of.down, gated=True, residual=x), second)
        gate_up = self._linear(x, of.gate_up, norm=second)
        return self._linear(gate_up, of.down, gated=True, residual=x)

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Return the states after a final norm, which is the identity in post-norm models."""
        if not isinstance(norm, nn.RMSNorm):
            return cast(Tensor, norm(x))
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.eps)
