"""Gates, temperatures and the draft vocabulary of a model folder, in ``fitted.safetensors``.

The file names the exits to which its gates were fitted, so writing it is one step: either the old
gates are there, or the new ones.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.errors import CheckpointError, OfframpWarning
from offramp.exits.gate import GATE_KINDS, NOTHING_FITTED, FittedExits, Gate, gate_of
from offramp.files import read_tensors, replacing
from offramp.models.base import EarlyExitModel
from offramp.models.huggingface.exits_file import EXITS_FILE
from offramp.reading import parsing

FITTED_FILE = "fitted.safetensors"
_FITTED_TO, _BOS = "exits_sha256", "bos"
_TEMPERATURE, _DRAFT_VOCAB = "temperature", "draft_vocab"


def save_fitted(fitted: FittedExits, folder: Path, *, exits: str) -> None:
    """Write gates, temperatures and draft vocabulary to the folder's ``fitted.safetensors``.

    Earlier ones are replaced, in one step. ``exits`` is the hash of what they were fitted to
    (``ModelFiles.exits_sha256``), which is stored with them.
    """
    tensors = {
        f"{kind}.{layer}.{name}": tensor.contiguous()
        for kind, gates in fitted.gates.items()
        for layer, gate in gates.items()
        for name, tensor in gate.state_dict().items()
    }
    for layer, temperature in fitted.temperatures.items():
        tensors[f"{_TEMPERATURE}.{layer}"] = torch.tensor(temperature, dtype=torch.float64)
    if fitted.draft_vocab is not None:
        tensors[_DRAFT_VOCAB] = fitted.draft_vocab.contiguous()
    about = {"format": "pt", _FITTED_TO: exits}
    if fitted.bos is not None:
        about[_BOS] = "yes" if fitted.bos else "no"
    with replacing(folder / FITTED_FILE) as aside:
        save_file(tensors, aside, metadata=about)


def fitted_path(folder: Path) -> Path | None:
    """Return the file with a folder's gates, temperatures and draft vocabulary, if it has one.

    Earlier versions kept them in ``exits.safetensors``.
    """
    paths = (folder / FITTED_FILE, folder / EXITS_FILE)
    return next((path for path in paths if path.exists()), None)


def load_fitted(
    folder: Path, *, exits: Callable[[], str] | None = None, device: torch.device | str = "cpu"
) -> FittedExits:
    """Read the gates, temperatures and draft vocabulary of a model folder, if it has any.

    ``exits`` returns the hash of the model's exits; if the gates were fitted to others, they are
    not used, and a warning says so. Raises CheckpointError if the file is damaged.
    """
    path = fitted_path(folder)
    if path is None:
        return NOTHING_FITTED
    with parsing(path, "gates, temperatures and a draft vocabulary"):
        found = _read(path, device)
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        if _BOS in about:
            found = replace(found, bos=about[_BOS] == "yes")
        apart = path.name == FITTED_FILE
        if apart and exits is not None and about.get(_FITTED_TO) != exits():
            warnings.warn(
                f"{path}: its gates were fitted to other exits than the model's, so they are "
                f"not used; fit them again with: offramp confidence {folder} --fit TEXT",
                OfframpWarning,
                stacklevel=2,
            )
            return NOTHING_FITTED
    return found


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
    path, early = fitted_path(folder), list(model.exit_layers[:-1])
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
