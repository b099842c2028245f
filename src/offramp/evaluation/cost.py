"""The cost of a routed token: layers, and floating-point operations (FLOPs)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from offramp.errors import ConfigError
from offramp.exits.confidence import confidence_named
from offramp.exits.gate import FittedExits
from offramp.models.base import EarlyExitModel, whole_step

T = TypeVar("T")

_PROBE = 8  # tokens; the FLOPs of a token are linear in the keys that it attends to


def compute_pct(counts: Sequence[int], exit_layers: Sequence[int], num_layers: int) -> float:
    """Return Compute%: layers run / layers in the model, in percent.

    ``counts[i]`` is the number of tokens that leave at exit i. Exit heads and missing keys and
    values are not counted.
    """
    layers_run = sum(count * layer for count, layer in zip(counts, exit_layers, strict=True))
    return 100.0 * layers_run / (sum(counts) * num_layers)


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """FLOPs of a token in each part of a model: matrix products only, 2 for a multiply-add."""

    exit_layers: tuple[int, ...]
    context: float
    "Mean number of keys that a token attends to."
    layers: tuple[float, ...]
    "FLOPs of each block, 1..L."
    heads: Mapping[int, float]
    "FLOPs of norm, adapter and LM head, by exit layer."
    gates: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    "FLOPs of each gate, by kind and exit layer."
    keys_values: tuple[float, ...] = ()
    "FLOPs of projecting only the keys and values of each block."
    complete_from: int | None = None
    "The model's ``complete_from``; None for a model whose blocks all write keys and values."

    @property
    def full(self) -> float:
        """FLOPs of the full model with its last head and without evaluating exits."""
        return sum(self.layers) + self.heads[self.exit_layers[-1]]

    def at(self, exit_layers: Sequence[int]) -> "ModelCost":
        """Return the cost of the same model with fewer exits."""
        return replace(self, exit_layers=tuple(exit_layers))

    def flops_pct_by_exit(
        self,
        confidence: str,
        *,
        evaluated: Sequence[bool] | None = None,
        missing_kv: str = "recompute",
    ) -> tuple[float, ...]:
        """Return the cost of a token that leaves at each exit, in percent of the full model.

        Under "recompute" the keys and values above the exit are not counted; "propagate" projects
        them in every block above. Those that blocks share above ``complete_from`` are counted under
        both, because every token has them.

        ``evaluated`` holds, for each exit but the last, whether its confidence is evaluated
        (default: all True). There a measure that reads logits costs the head, and a gate costs the
        gate. A token that leaves needs the head once. ``patience`` counts over all exits, so it is
        evaluated at every exit before the last one in ``evaluated``.
        """
        measure = confidence_named(confidence)
        early = self.exit_layers[:-1]
        evaluated = [True] * len(early) if evaluated is None else list(evaluated)
        if confidence == "patience":
            evaluated = [any(evaluated[index:]) for index in range(len(evaluated))]
        passed, costs = 0.0, []
        shared = len(self.layers) if self.complete_from is None else self.complete_from
        for layer, read in zip(early, evaluated, strict=True):
            head = self.heads[layer]
            gate = self.gate(confidence, layer) if measure.needs_gate and read else 0.0
            owed = layer if missing_kv == "propagate" else max(layer, shared)
            above = sum(self.keys_values[owed:])
            costs.append(sum(self.layers[:layer]) + passed + gate + head + above)
            passed += gate + (head if measure.needs_head and read else 0.0)
        last = self.exit_layers[-1]
        costs.append(sum(self.layers[:last]) + passed + self.heads[last])
        return tuple(100.0 * cost / self.full for cost in costs)

    def gate(self, kind: str, layer: int) -> float:
        """Return the FLOPs of a gate. Raises ConfigError if they were not counted."""
        try:
            return self.gates[kind][layer]
        except KeyError:
            raise ConfigError(
                f"cost: expected the cost of a {kind} at exit layer {layer}, got none"
            ) from None


def model_cost(
    model: EarlyExitModel, *, context: float, fitted: FittedExits | None = None
) -> ModelCost:
    """Count the FLOPs of every block, exit and gate, by running each on a few tokens.

    ``context`` is the mean number of keys that a token attends to: (T + 1) / 2 in windows of T
    tokens. It works for every model, because it uses only the methods of ``EarlyExitModel``.
    """
    if context < 1:
        raise ConfigError(f"context: expected at least 1 key, got {context}")
    counted = _counted(model)
    layers = tuple(
        first + (context - _PROBE) * (second - first) / _PROBE
        for first, second in zip(counted.few, counted.many, strict=True)
    )
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    h = model.embed(ids, step=whole_step(ids))
    gates = fitted.gates if fitted else {}
    return ModelCost(
        exit_layers=tuple(model.exit_layers),
        context=context,
        layers=layers,
        heads=dict(counted.heads),
        gates={
            kind: {layer: _flops(partial(gate, h))[0] for layer, gate in by_layer.items()}
            for kind, by_layer in gates.items()
        },
        keys_values=counted.keys_values,
        complete_from=model.complete_from,
    )


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """What was counted of a model: it is the same for every context, and takes seconds to count."""

    few: list[float]
    many: list[float]
    heads: dict[int, float]
    keys_values: tuple[float, ...]


_KNOWN: WeakKeyDictionary[Any, dict[tuple[int, ...], _Counted]] = WeakKeyDictionary()


def _counted(model: EarlyExitModel) -> _Counted:
    """Count the FLOPs of a model's blocks and heads, once for a module of the same size and exits.

    A quantised weight becomes numbers when it is counted, which takes seconds.
    """
    exits = tuple(model.exit_layers)
    if not isinstance(model, nn.Module):
        return _count(model, exits)
    size = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    known, key = _KNOWN.setdefault(model, {}), (size, *exits)
    if key not in known:
        known[key] = _count(model, exits)
    return known[key]


def _count(model: EarlyExitModel, exits: Sequence[int]) -> _Counted:
    few, many = (_flops_a_token(model, tokens) for tokens in (_PROBE, 2 * _PROBE))
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    h = model.embed(ids, step=whole_step(ids))
    return _Counted(
        few=few,
        many=many,
        heads={layer: _flops(partial(model.unembed, h, layer))[0] for layer in exits},
        keys_values=_keys_values(model),
    )


def _keys_values(model: EarlyExitModel) -> tuple[float, ...]:
    """Return the FLOPs of projecting one token's keys and values in each block."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    step = replace(whole_step(ids), cache=model.make_cache(1, 1))
    h = model.embed(ids, step=step)
    return tuple(
        _flops(partial(model.project_kv, h, layer, layer + 1, step=step))[0]
        for layer in range(model.num_layers)
    )


def _flops_a_token(model: EarlyExitModel, tokens: int) -> list[float]:
    """Return the FLOPs of a token in each block, if it attends to ``tokens`` keys."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    step = whole_step(ids)
    h: Tensor = model.embed(ids, step=step)
    found = []
    for layer in range(model.num_layers):
        flops, h = _flops(partial(model.run_layers, h, layer, layer + 1, step=step))
        found.append(flops / tokens)
    return found


def _flops(part: Callable[[], T]) -> tuple[float, T]:
    """Return the FLOPs that PyTorch counts while a part of a model runs, and the part's result.

    Gradients are on, because without them a model may use kernels that PyTorch does not count.
    Attention runs as matrix products, which are counted.
    """
    with (
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        result = part()
    return float(counter.get_total_flops()), result
