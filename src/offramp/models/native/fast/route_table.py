"""The exits of a model as the structures that the compiled router reads (_route.h)."""

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.exits.gate import Gate
from offramp.models.base import FEW_TOKENS
from offramp.models.checks import check_tensor
from offramp.models.exit_heads import ExitHead
from offramp.models.native.fast.kernel_weights import KernelWeights
from offramp.models.native.fast.kernels import KernelCache
from offramp.models.native.fast.products import (
    CPU,
    DTYPES,
    Weight,
    addresses,
    format_of,
    kernels_fit,
)
from offramp.models.native.quantised_weight import QuantisedWeight
from offramp.models.router import GateRule, RouterSpec

Struct = TypeVar("Struct", bound=ctypes.Structure)


def struct_of(kind: type[Struct], values: dict[str, Any]) -> Struct:
    """Return the structure with these values, which must name all of its fields."""
    assert sorted(values) == sorted(name for name, *_ in kind._fields_)
    return kind(**values)


def _fields(whole: str, real: str, rest: str) -> list[tuple[str, Any]]:
    kinds = ((whole, ctypes.c_uint64), (real, ctypes.c_double), (rest, ctypes.c_int64))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class ExitStruct(ctypes.Structure):
    """An exit: its gate, bounds and head. Every field has 8 bytes, as in _route.h."""

    _fields_: ClassVar[Any] = _fields(
        "gate_norm gate_up gate_up_bias gate_out gate_out_bias bounds extra head_norm head "
        "head_scales head_minimums",
        "head_eps",
        "layer units outputs bounded head_format norm_bfloat16",
    )


class RouteStruct(ctypes.Structure):
    """A model, its cache, space for a call, and the pending tokens."""

    _fields_: ClassVar[Any] = _fields(
        "weights embeddings cosines sines keys values lengths exits x slots rows room gate states "
        "pending_states pending_slots pending_rows pending_layers",
        "eps gate_eps",
        "format bfloat16 post hidden lower upper heads kv_heads size capacity cached layer_bytes "
        "cache_layers complete_from recompute gain exit_count vocab positions pending "
        "pending_space",
    )


class Head:
    """The norm and LM head of an exit in the form of the kernels."""

    def __init__(self, norm: Tensor | None, weight: Weight, *, eps: float) -> None:
        if norm is not None:
            dtype = norm.dtype if isinstance(weight, QuantisedWeight) else weight.dtype
            check_tensor("norm", norm, weight.shape[1:], dtype, CPU, contiguous=True)
        self.norm, self.weight, self.eps = norm, weight, eps


def head_of(module: nn.Module, weight: Any) -> Head | None:
    """Return the head of RMSNorm (or no norm) and a weight; None if the kernels cannot read it.

    ``module`` is the norm, or an exit's own head.
    """
    norm = module
    if isinstance(module, ExitHead):
        if module.adapter is not None:
            return None
        norm = module.norm
    if not kernels_fit(weight):
        return None
    if isinstance(weight, Tensor):
        weight = weight.detach()
    if isinstance(norm, nn.Identity):
        return Head(None, weight, eps=0.0)
    if not isinstance(norm, nn.RMSNorm) or norm.eps is None or norm.weight.dtype not in DTYPES:
        return None
    if isinstance(weight, Tensor) and norm.weight.dtype != weight.dtype:
        return None
    return Head(norm.weight.detach(), weight, eps=norm.eps)


def can_route(spec: RouterSpec) -> bool:
    """Return whether the kernels read the gates of a rule, and there are not too many exits."""
    return (
        len(spec.exits) < FEW_TOKENS
        and all(_readable(each.gate) for each in spec.exits)
        and len({each.gate.norm.eps for each in spec.exits}) <= 1
    )


def _readable(gate: Gate) -> bool:
    return all(
        tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous()
        for tensor in gate.parameters()
    )


def gate_eps(spec: RouterSpec) -> float:
    """Return the epsilon of the gates' norms, which is the same in all of them."""
    return float(spec.exits[0].gate.norm.eps or 0.0) if spec.exits else 0.0


def exits_of(
    spec: RouterSpec, heads: Sequence[Head | None], hidden: int, layers: int
) -> tuple[Any, list[Weight]]:
    """Return the exits as an array of structures, and the weights that it points to."""
    held: list[Weight] = []

    def address(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        held.append(tensor.detach())
        return tensor.data_ptr()

    rules: list[GateRule | None] = [*spec.exits, None]
    structs = []
    for index, (rule, head) in enumerate(zip(rules, heads, strict=True)):
        values: dict[str, Any] = {name: 0 for name, _ in ExitStruct._fields_}
        if rule is not None:
            gate, later = rule.gate, len(spec.exits) - index
            up, out = gate.up_proj, gate.out_proj
            check_tensor("gate", gate.norm.weight, (hidden,), torch.float32, CPU)
            check_tensor("gate", up.weight, (up.out_features, hidden), torch.float32, CPU)
            check_tensor(
                "gate", out.weight, (out.out_features, up.out_features), torch.float32, CPU
            )
            bounds = rule.bounds.contiguous()
            check_tensor("bounds", bounds, (max(1, len(bounds)),), torch.float32, CPU)
            extra = None if rule.extra is None else torch.tensor(rule.extra, dtype=torch.float32)
            if extra is not None and (out.out_features, len(extra)) != (later, later):
                raise ConfigError(
                    f"gate: expected {later} outputs and costs at exit layer {rule.layer}, got "
                    f"{out.out_features} and {len(extra)}"
                )
            values |= {
                "gate_norm": address(gate.norm.weight),
                "gate_up": address(up.weight),
                "gate_up_bias": address(up.bias),
                "gate_out": address(out.weight),
                "gate_out_bias": address(out.bias),
                "bounds": address(bounds),
                "extra": address(extra),
                "units": up.out_features,
                "outputs": out.out_features,
                "bounded": len(bounds),
            }
        if head is not None:
            names = ("head", "head_scales", "head_minimums")
            held.append(head.weight)
            values |= {
                "head_norm": address(head.norm),
                **dict(zip(names, addresses(head.weight), strict=True)),
                "head_eps": head.eps,
                "head_format": format_of(head.weight),
                "norm_bfloat16": head.norm is not None and head.norm.dtype == torch.bfloat16,
            }
        values["layer"] = layers if rule is None else rule.layer
        structs.append(struct_of(ExitStruct, values))
    return (ExitStruct * len(structs))(*structs), held


def of_weights(weights: KernelWeights) -> dict[str, Any]:
    """Return the fields of ``RouteStruct`` that the blocks' weights give."""
    return {
        "weights": weights.at(0),
        "eps": weights.eps,
        "format": weights.format,
        "post": weights.post,
        "hidden": weights.hidden,
        "lower": weights.units,
        "upper": weights.upper_units,
        "heads": weights.heads,
    }


def of_cache(cache: KernelCache) -> dict[str, Any]:
    """Return the fields of ``RouteStruct`` that the cache gives."""
    return {
        "cosines": cache.cos_at,
        "sines": cache.sin_at,
        "keys": cache.keys_at,
        "values": cache.values_at,
        "lengths": cache.lengths_at,
        "bfloat16": cache.bfloat16,
        "kv_heads": cache.kv_heads,
        "size": cache.size,
        "capacity": cache.capacity,
        "cached": cache.rows,
        "layer_bytes": cache.layer_bytes,
        "cache_layers": cache.layers,
        "positions": min(cache.capacity - 1, cache.positions),  # the last slot is spare
    }
