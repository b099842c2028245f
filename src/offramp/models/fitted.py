"""Gates, temperatures and the draft vocabulary of a model folder, in ``exits.safetensors``."""

import math
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.errors import CheckpointError
from offramp.exits.gate import GATE_KINDS, NOTHING_FITTED, FittedExits, Gate, gate_of
from offramp.files import file_sha256, parsing, read_json, read_tensors, replacing, write_json
from offramp.models.base import EarlyExitModel
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
    with parsing(path, "gates, temperatures and a draft vocabulary"):
        return _read(path, device)


def _read(path: Path, device: torch.device | str) -> FittedExits:
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
            temperatures[int(layer)] = temperature = float(tensor.item())
            if not (math.isfinite(temperature) and temperature > 0):
                raise CheckpointError(f"{path}: expected {name} above 0, got {temperature}")
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


def check_fitted(fitted: FittedExits, model: EarlyExitModel, folder: Path) -> None:
    """Raise a CheckpointError if a folder's gates or its draft vocabulary do not fit a model."""
    path, early = folder / EXITS_FILE, list(model.exit_layers[:-1])
    for kind, gates in fitted.gates.items():
        for layer, gate in gates.items():
            same_exits = kind == "gain" and sorted(gates) == early
            got = (gate.up_proj.in_features, gate.out_proj.out_features)
            outputs = (
                1 if kind == "gate" else len(early[early.index(layer) :]) if same_exits else got[1]
            )
            if got != (model.hidden_size, outputs):
                raise CheckpointError(
                    f"{path}: expected a {kind} from width {model.hidden_size} to {outputs} at "
                    f"exit layer {layer}, got one from width {got[0]} to {got[1]}"
                )
    drafts = fitted.draft_vocab
    if drafts is not None and not (
        drafts.dtype == torch.int64
        and drafts.ndim == 1
        and len(drafts)
        and 0 <= int(drafts.min()) <= int(drafts.max()) < model.vocab_size
    ):
        raise CheckpointError(
            f"{path}: expected the ids of {_DRAFT_VOCAB} from 0 to {model.vocab_size - 1}, got "
            f"{drafts.dtype} of shape {tuple(drafts.shape)} or other ids"
        )


def _is_fitted(name: str) -> bool:
    return name.split(".")[0] in (*GATE_KINDS, _TEMPERATURE, _DRAFT_VOCAB)
