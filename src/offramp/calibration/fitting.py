"""Fit gates and temperatures to the exits of a trained model. The model does not change."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from offramp.evaluation.sample import ExitSample, collect_sample
from offramp.exits.gate import (
    GATE_KINDS,
    FittedExits,
    Gate,
    GateConfig,
    fit_gate,
)
from offramp.exits.temperature import fit_temperature
from offramp.models.base import EarlyExitModel

TEMPERATURE_LOGITS = 50_000_000
"""Largest number of logits of one exit to which a temperature is fitted; 200 MB in float32."""

_AT_ONCE = 512  # tokens


def fit_exits(
    model: EarlyExitModel,
    batches: Iterable[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]],
    *,
    kinds: Sequence[str] = GATE_KINDS,
    temperatures: bool = False,
    max_tokens: int = 131_072,
    config: GateConfig | None = None,
) -> FittedExits:
    """Fit gates of these kinds, and temperatures, for every exit but the last, from one pass.

    Fit gates on training text and temperatures on held-out text. ``batches`` must be in a random
    order.
    """
    sample = collect_sample(model, batches, max_tokens=max_tokens)
    gates = {kind: fit_gates(kind, sample, config) for kind in kinds}
    found = fit_temperatures(model, sample) if temperatures else {}
    return FittedExits(gates=gates, temperatures=found)


def fit_gates(
    kind: str,
    sample: ExitSample,
    config: GateConfig | None = None,
    *,
    on_gate: Callable[[], None] = lambda: None,
) -> dict[int, Gate]:
    """Fit a gate of this kind for every exit but the last; returns gates by exit layer.

    ``on_gate`` is called after each gate.
    """
    trace = sample.trace
    early = trace.exit_layers[:-1]
    agree = torch.from_numpy(trace.argmax == trace.argmax[-1]).float()
    assert trace.kl is not None
    kl = torch.from_numpy(trace.kl)
    gates = {}
    for index, layer in enumerate(early):
        later = agree[index : index + 1] if kind == "gate" else kl[index : len(early)]
        gates[layer] = fit_gate(kind, sample.states[layer], later.T.contiguous(), config)
        on_gate()
    return gates


@torch.no_grad()
def fit_temperatures(model: EarlyExitModel, sample: ExitSample) -> dict[int, float]:
    """Fit the temperature of every exit but the last; returns temperatures by exit layer."""
    temperatures = {}
    for layer in sample.trace.exit_layers[:-1]:
        states = sample.states[layer][None]  # (1, N, D)
        logits: list[Tensor] = []
        for start in range(0, states.shape[1], _AT_ONCE):
            h = states[:, start : start + _AT_ONCE].to(model.device, sample.dtype)
            logits.append(model.unembed(h, layer)[0].float())
            if sum(part.numel() for part in logits) >= TEMPERATURE_LOGITS:
                break
        found = torch.cat(logits)
        targets = torch.from_numpy(sample.trace.targets[: len(found)]).to(found.device)
        temperatures[layer] = fit_temperature(found, targets)
    return temperatures
