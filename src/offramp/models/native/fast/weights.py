"""The weights of the native decoder's blocks in the form for steps of a few tokens.

Queries, keys and values are one matrix here, and so are gate and up. The blocks' own parameters
become views of these matrices, so nothing is stored twice, and an in-place change (an optimizer's
step, ``load_state_dict``) changes both. The parameters keep their names and shapes, because fused
parameters would change the order of sums in training, and so its figures.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.models.kv_cache import KVCache
from offramp.models.native.fast.kernel_weights import KernelWeights
from offramp.models.native.fast.kernels import kernels_fit
from offramp.models.native.fast.linear import fuse
from offramp.models.native.fast.products import Weight
from offramp.models.native.quantised import QuantisedLinear
from offramp.models.native.quantised_weight import QuantisedWeight, concatenated


@dataclass(frozen=True, kw_only=True)
class WeightsOfBlock:
    """The matrices and norms of one block."""

    qkv: Weight
    kv: Weight | None
    "The part of ``qkv`` that gives keys and values; None if the block has none of its own."
    out: Weight
    gate_up: Weight
    down: Weight
    norms: tuple[Tensor, Tensor]

    @property
    def every(self) -> tuple[Weight, ...]:
        """Return the weights in the order in which ``KernelWeights`` takes them."""
        return (self.qkv, self.out, self.gate_up, self.down, *self.norms)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of all blocks, and the addresses of the parameters that they were made from."""

    blocks: tuple[WeightsOfBlock, ...]
    kernel: KernelWeights | None
    "The weights as the compiled kernels read them; None if they cannot."
    registers: tuple[dict[str, Any], ...]
    "The dictionaries in which the blocks' modules hold their parameters."
    parameters: tuple[Tensor, ...]
    "The parameters' tensors, kept so that no other tensor can be allocated at their addresses."

    @cached_property
    def _places(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters]

    def current(self) -> bool:
        """Return whether no parameter was replaced or moved since."""
        held = [_held(register).data_ptr() for register in self.registers]
        return held == self._places


def _held(register: dict[str, Any]) -> Tensor:
    """Return the tensor of a module's parameters or buffers that shows whether it was replaced."""
    found: Tensor = register["weight" if "weight" in register else "values"]
    return found


class BlockWeights:
    """Finds the blocks' weights, once for each cache that is used for decoding.

    A parameter that is replaced or moved (``model.to``, ``module.weight = ...``) is noticed when
    a step comes with another cache than the step before: the keys and values in a cache belong
    to the weights with which they were computed.
    """

    def __init__(self, blocks: nn.ModuleList, *, head_dim: int, eps: float, post: bool) -> None:
        self._blocks, self._head_dim, self._eps, self._post = blocks, head_dim, eps, post
        self._found: Weights | None = None
        self._cache: weakref.ref[KVCache] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop the weights that were found; a copy finds those of its own blocks."""
        return {**vars(self), "_found": None, "_cache": None}

    def of(self, cache: KVCache) -> Weights:
        """Return the weights for steps with this cache."""
        found = self._found
        if found is None or self._cache is None or self._cache() is not cache:
            if found is None or not found.current():
                found = self._found = self._read()
            self._cache = weakref.ref(cache)
        return found

    @property
    def kernels_read(self) -> bool:
        """Whether the compiled kernels could read the weights, when they were last read."""
        if self._found is None:
            self._found = self._read()
        return self._found.kernel is not None

    def _read(self) -> Weights:
        blocks: list[WeightsOfBlock] = []
        modules: list[nn.Module] = []
        for block in self._blocks:
            of, read = _read_block(block, post=self._post)
            blocks.append(of)
            modules += read
        registers = tuple(
            module._buffers if isinstance(module, QuantisedLinear) else module._parameters
            for module in modules
        )
        return Weights(
            blocks=tuple(blocks),
            kernel=self._for_kernels(blocks),
            registers=registers,
            parameters=tuple(_held(register).detach() for register in registers),
        )

    def _for_kernels(self, blocks: Sequence[WeightsOfBlock]) -> KernelWeights | None:
        if not kernels_fit(blocks[0].qkv, self._head_dim):
            return None
        every = [of.every for of in blocks]
        try:
            return KernelWeights(
                every,
                head_dim=self._head_dim,
                eps=self._eps,
                post=self._post,
                cache_layers=sum(of.kv is not None for of in blocks),
            )
        except ConfigError:  # such as blocks of several precisions
            return None


class RowsOf:
    """The rows of weights that belong to some tokens, which are kept for the next call."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Weight, Tensor, tuple[int, int], Weight]] = {}

    def of(self, weight: Weight, vocab: Tensor) -> Weight:
        """Return ``weight[vocab]``."""
        numbers = weight.values if isinstance(weight, QuantisedWeight) else weight
        current = numbers.data_ptr(), 0 if numbers.is_inference() else numbers._version
        kept = self._kept.get(id(weight))
        if kept and kept[0] is weight and kept[1] is vocab and kept[2] == current:
            return kept[3]
        rows = weight[vocab]
        self._kept[id(weight)] = weight, vocab, current, rows
        return rows


def _read_block(block: Any, *, post: bool) -> tuple[WeightsOfBlock, list[nn.Module]]:
    """Return a block's weights, and the modules that hold their parameters."""
    attention, mlp = block.self_attn, block.mlp
    queries = [attention.q_proj]
    if attention.projects_kv:
        queries += [attention.k_proj, attention.v_proj]
    gates = [mlp.gate_proj, mlp.up_proj]
    norms = (
        (block.post_attention_layernorm, block.post_feedforward_layernorm)
        if post
        else (block.input_layernorm, block.post_attention_layernorm)
    )
    qkv = _fused(queries)
    weights = WeightsOfBlock(
        qkv=qkv,
        kv=qkv[attention.q_proj.out_features :] if attention.projects_kv else None,
        out=attention.o_proj.weight,
        gate_up=_fused(gates),
        down=mlp.down_proj.weight,
        norms=(norms[0].weight, norms[1].weight),
    )
    return weights, [*queries, attention.o_proj, *gates, mlp.down_proj, *norms]


def _fused(linears: list[Any]) -> Weight:
    """Return the weights of linear maps of the same input as one; see ``fuse``."""
    if not isinstance(linears[0], QuantisedLinear):
        return fuse(linears)
    whole = concatenated([linear.weight for linear in linears])
    start = 0
    for linear in linears:  # a part of whole blocks is a view, so nothing is stored twice
        linear.weight = whole[start : start + linear.out_features]
        start += linear.out_features
    return whole
