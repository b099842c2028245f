"""Gates, temperatures and the draft vocabulary of a model folder, in ``exits.safetensors``."""

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.errors import CheckpointError
from offramp.exits.gate import GATE_KINDS, NOTHING_FITTED, FittedExits, Gate, gate_of
from offramp.files import file_sha256, read_json, read_tensors, replacing, write_json
from offramp.models.huggingface.exits_file import EXITS_FILE, EXITS_JSON

_TEMPERATURE, _DRAFT_VOCAB = "temperature", "draft_vocab"


def save_fitted(fitted: FittedExits, folder: Path) -> None:
    """Write gates, temperatures and draft vocabulary into the folder's ``exits.safetensors``.

    Earlier gates, temperatures and draft vocabulary are replaced; exit heads in the file are
    kept. If the folder has an ``offramp.json``, the new hash of the file is written there.
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
    """Read the gates, temperatures and draft vocabulary of a model folder, if it has any.

    Raises CheckpointError if the file is damaged.
    """
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
