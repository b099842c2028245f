"""Fit gates and temperatures to the exits of a trained model, which stays as it is."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.errors import CheckpointError
from offramp.evaluation.sample import ExitSample, collect_sample
from offramp.exits.gate import (
    GATE_KINDS,
    NOTHING_FITTED,
    FittedExits,
    Gate,
    GateConfig,
    fit_gate,
    gate_of,
)
from offramp.exits.temperature import fit_temperature
from offramp.files import file_sha256, read_json, read_tensors, replacing, write_json
from offramp.models.base import EarlyExitModel
from offramp.models.huggingface.exits_file import EXITS_FILE, EXITS_JSON

TEMPERATURE_LOGITS = 50_000_000
"""Logits of one exit that a temperature is fitted to at the most; 200 MB in float32."""

_TEMPERATURE, _DRAFT_VOCAB = "temperature", "draft_vocab"
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
    """Gates of these kinds, and temperatures, for every exit but the last, from one pass.

    Fit gates on training text, temperatures on held-out text; ``batches`` in a random order.
    """
    sample = collect_sample(model, batches, max_tokens=max_tokens)
    gates = {kind: fit_gates(kind, sample, config) for kind in kinds}
    found = fit_temperatures(model, sample) if temperatures else {}
    return FittedExits(gates=gates, temperatures=found)


def fit_gates(kind: str, sample: ExitSample, config: GateConfig | None = None) -> dict[int, Gate]:
    """A gate of this kind for every exit but the last, by exit layer."""
    trace = sample.trace
    early = trace.exit_layers[:-1]
    agree = torch.from_numpy(trace.argmax == trace.argmax[-1]).float()
    assert trace.kl is not None
    kl = torch.from_numpy(trace.kl)
    gates = {}
    for index, layer in enumerate(early):
        later = agree[index : index + 1] if kind == "gate" else kl[index : len(early)]
        gates[layer] = fit_gate(kind, sample.states[layer], later.T.contiguous(), config)
    return gates


@torch.no_grad()
def fit_temperatures(model: EarlyExitModel, sample: ExitSample) -> dict[int, float]:
    """The temperature of every exit but the last, by exit layer."""
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


def save_fitted(fitted: FittedExits, folder: Path) -> None:
    """Write gates, temperatures and draft vocabulary into the folder's ``exits.safetensors``.

    Earlier ones go; what else the file holds (exit heads) stays. ``offramp.json``, where there
    is one, gets the file's new hash.
    """
    path = folder / EXITS_FILE
    kept = read_tensors(path) if path.exists() else {}
    tensors = {name: tensor for name, tensor in kept.items() if not _is_fitted(name)}
    metadata = {"format": "pt"}
    if path.exists():
        with safe_open(path, framework="pt") as file:
            metadata |= file.metadata() or {}
    for kind, gates in fitted.gates.items():
        for layer, gate in gates.items():
            for name, tensor in gate.state_dict().items():
                tensors[f"{kind}.{layer}.{name}"] = tensor.contiguous()
    for layer, temperature in fitted.temperatures.items():
        tensors[f"{_TEMPERATURE}.{layer}"] = torch.tensor(temperature, dtype=torch.float64)
    if fitted.draft_vocab is not None:
        tensors[_DRAFT_VOCAB] = fitted.draft_vocab.contiguous()
    about = folder / EXITS_JSON
    stored = read_json(about) if about.exists() else None
    with replacing(path) as aside:
        save_file(tensors, aside, metadata=metadata)
    if stored is not None:
        write_json(about, {**stored, "exits_sha256": file_sha256(path)})


def load_fitted(folder: Path, *, device: torch.device | str = "cpu") -> FittedExits:
    """What ``save_fitted`` left in a model folder; nothing where nothing was saved."""
    path = folder / EXITS_FILE
    if not path.exists():
        return NOTHING_FITTED
    temperatures: dict[int, float] = {}
    states: dict[tuple[str, int], dict[str, Tensor]] = defaultdict(dict)
    draft_vocab = None
    for name, tensor in read_tensors(path).items():
        if name == _DRAFT_VOCAB:
            draft_vocab = tensor.to(device)
        if name == _DRAFT_VOCAB or not _is_fitted(name):
            continue
        kind, layer, *rest = name.split(".", 2)
        if not (layer.isdecimal() and (kind == _TEMPERATURE) != bool(rest)):
            raise CheckpointError(f"{path}: expected gates and temperatures by layer, got {name}")
        if kind == _TEMPERATURE:
            temperatures[int(layer)] = float(tensor)
        else:
            states[kind, int(layer)][rest[0]] = tensor
    gates: dict[str, dict[int, Gate]] = defaultdict(dict)
    for (kind, number), state in sorted(states.items()):
        try:
            gates[kind][number] = gate_of(state).to(device)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: expected a whole {kind} at exit layer {number}, "
                f"got: {' '.join(str(error).split())}"
            ) from None
    return FittedExits(gates=dict(gates), temperatures=temperatures, draft_vocab=draft_vocab)


def _is_fitted(name: str) -> bool:
    return name.split(".")[0] in (*GATE_KINDS, _TEMPERATURE, _DRAFT_VOCAB)
