"""The weights of the native decoder's blocks, as steps of a few tokens read them.

Nothing is copied but what was not fused before: each block's parameters are looked up once, and
anew when one of them was replaced or moved.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from offramp.models.native.fast.kernels import kernels_fit
from offramp.models.native.fast.linear import fuse


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """Parameters that were looked up."""

    registers: list[dict[str, Any]]
    "Where they are registered."
    addresses: list[int]
    "Where they lay."

    def current(self) -> bool:
        """None was replaced or moved since."""
        return [each["weight"].data_ptr() for each in self.registers] == self.addresses


@dataclass(frozen=True, kw_only=True)
class WeightsOfBlock(_Looked):
    """What one block multiplies by."""

    qkv: Tensor
    kv: Tensor
    "The part of it that gives keys and values."
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norms: tuple[Tensor, Tensor]
    parameters: tuple[Tensor, ...]
    "What was looked up; held, so that nothing else can be at its address."
    dtype: torch.dtype | None
    "What the compiled kernels read, float32 or bfloat16, if they can and all are the same."

    def row(self) -> tuple[int, ...]:
        """The addresses that ``kernels.blocks`` reads."""
        fused = (self.qkv, self.out, self.gate_up, self.down, *self.norms)
        return tuple(weight.data_ptr() for weight in fused)


@dataclass(frozen=True, kw_only=True)
class _Table(_Looked):
    """The weights of all blocks, as the kernels that run them in one call read them."""

    rows: Int[Tensor, "L 6"]
    "Addresses, a row a block."
    dtype: torch.dtype | None
    "What the kernels read; None if they cannot read every weight, or not as one precision."


class BlockWeights:
    """Looks up the blocks' parameters."""

    def __init__(self, blocks: nn.ModuleList, *, head_dim: int, post: bool) -> None:
        self._blocks, self._head_dim, self._post = blocks, head_dim, post
        self._of: list[WeightsOfBlock | None] = [None] * len(self._blocks)
        self._table: _Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks up its own parameters."""
        return {**vars(self), "_of": [None] * len(self._blocks), "_table": None}

    def of(self, layer: int) -> WeightsOfBlock:
        """Those of block ``layer`` + 1."""
        weights = self._of[layer]
        if weights is None or not weights.current():
            weights = self._of[layer] = self._read(self._blocks[layer])
        return weights

    @property
    def dtype(self) -> torch.dtype | None:
        """What the kernels read all blocks' weights as; None if they cannot."""
        return self._current().dtype

    def addresses(self, dtype: torch.dtype) -> Int[Tensor, "L 6"] | None:
        """Of every block's weights, for the kernels; None if not all are of ``dtype``."""
        table = self._current()
        return table.rows if table.dtype == dtype else None

    def _current(self) -> _Table:
        table = self._table
        if table is None or not table.current():
            every = [self.of(layer) for layer in range(len(self._blocks))]
            alike = all(of.dtype == every[0].dtype for of in every)
            table = self._table = _Table(
                rows=torch.tensor([of.row() for of in every]),
                dtype=every[0].dtype if alike else None,
                registers=[each for of in every for each in of.registers],
                addresses=[each for of in every for each in of.addresses],
            )
        return table

    def _read(self, block: Any) -> WeightsOfBlock:
        attention, mlp = block.self_attn, block.mlp
        qkv = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up = fuse([mlp.gate_proj, mlp.up_proj])
        norms = (
            (block.post_attention_layernorm, block.post_feedforward_layernorm)
            if self._post
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
        every = (qkv, gate_up, *(module.weight for module in modules))
        alike = all(each.dtype == qkv.dtype and each.is_contiguous() for each in every)
        return WeightsOfBlock(
            dtype=qkv.dtype if alike and kernels_fit(qkv, self._head_dim) else None,
            qkv=qkv,
            kv=qkv[attention.q_proj.out_features :],
            out=attention.o_proj.weight,
            gate_up=gate_up,
            down=mlp.down_proj.weight,
            norms=(norms[0].weight, norms[1].weight),
            registers=[module._parameters for module in modules],
            parameters=tuple(module.weight.detach() for module in modules),
            addresses=[module.weight.data_ptr() for module in modules],
        )
