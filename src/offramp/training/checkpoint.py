"""Checkpoints from which a run resumes; the latest few are kept.

A checkpoint is a folder ``step-00000100`` with the parameters, the optimizer's state and
``state.json``, which contains the hashes of all three. It is written under a temporary name,
synced and renamed. A damaged checkpoint is reported, and the one before it is used.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from offramp.errors import CheckpointError
from offramp.files import file_sha256, obey_umask, read_tensors, reason, sync, tensor_infos
from offramp.models.base import TrainableModel
from offramp.reading import parsing, read_json, value_of
from offramp.training.distributed import ALONE, Processes, sharded_like, whole
from offramp.training.validation import Validation

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The folder with the checkpoints of one run."""

    folder: Path
    keep: int = 2

    def save(
        self,
        step: int,
        model: TrainableModel,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        processes: Processes = ALONE,
    ) -> None:
        """Write the checkpoint of a step, completely or not at all, and delete the oldest ones.

        Every process must call it; rank 0 writes the same files as a run in one process. Raises
        CheckpointError if it cannot be written; earlier checkpoints are then kept.
        """
        state = {"model_sha256": shapes_sha256(model), **state}
        parameters = whole(_parameters(model), processes)
        moments = whole(_flat(optimizer), processes)
        processes.on_main(lambda: self._write(step, parameters, moments, state))

    def _write(
        self,
        step: int,
        parameters: dict[str, Tensor],
        moments: dict[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        target = self.folder / f"step-{step:08}"
        aside = self.folder / f".{target.name}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            save_file(parameters, aside / MODEL)
            save_file(moments, aside / OPTIMIZER)
            for name in (MODEL, OPTIMIZER):
                obey_umask(aside / name)
            hashes = {name: file_sha256(aside / name) for name in (MODEL, OPTIMIZER)}
            content = {"step": step, "sha256": hashes, **state}
            content["state_sha256"] = _state_sha256(content)
            (aside / STATE).write_text(json.dumps(content), encoding="utf-8")
            for path in (*aside.iterdir(), aside):
                sync(path)
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            kept = self.paths()
            raise CheckpointError(
                f"{target}: the checkpoint cannot be written ({reason(error)}); "
                + (f"the last good one is {kept[-1].name}" if kept else "there is none before it")
            ) from None
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def paths(self) -> list[Path]:
        """Return the folders of the checkpoints, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name))

    def load_latest(
        self,
        model: TrainableModel,
        optimizer: torch.optim.Optimizer,
        processes: Processes = ALONE,
    ) -> tuple["SavedState | None", list[str]]:
        """Load the newest complete checkpoint.

        Returns its state (None if there is none) and a sentence for each newer, damaged one.
        Every process reads the checkpoint; if the model is sharded, it keeps only its shard.
        Raises CheckpointError if the processes see different checkpoints, or if the checkpoint
        is of another model.
        """
        state, damaged = self._newest(model, optimizer)
        step = state.step if state else 0
        if processes.any(step != processes.from_main(step)):
            raise CheckpointError(
                f"{self.folder}: expected a folder that every process reads, but they see "
                "different checkpoints in it"
            )
        return state, damaged

    def _newest(
        self, model: TrainableModel, optimizer: torch.optim.Optimizer
    ) -> tuple["SavedState | None", list[str]]:
        damaged: list[str] = []
        for path in reversed(self.paths()):
            try:
                with parsing(path, "a whole checkpoint"):
                    return _load(path, model, optimizer), damaged
            except _AnotherModelError:
                raise
            except CheckpointError as error:
                damaged.append(f"{path.name} is damaged ({error})")
        return None, damaged


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """The content of ``state.json`` in a checkpoint."""

    step: int
    validations: tuple[Validation, ...]
    model_sha256: str
    "Hash of the names and shapes of the model's parameters."
    sha256: Mapping[str, str]
    "Hash of each other file of the checkpoint."
    state_sha256: str
    "Hash of all other fields."


class _AnotherModelError(CheckpointError):
    """A whole checkpoint has parameters of other names or shapes."""


def read_state(checkpoint: Path) -> SavedState:
    """Read the ``state.json`` of a checkpoint. Raises CheckpointError if it is damaged."""
    path = checkpoint / STATE
    content = read_json(path)
    state = value_of(SavedState, content, path)
    if state.state_sha256 != _state_sha256(content):
        raise CheckpointError(f"{path}: expected the state as it was written, but its hash differs")
    return state


def _load(path: Path, model: TrainableModel, optimizer: torch.optim.Optimizer) -> SavedState:
    state = read_state(path)
    mine = shapes_sha256(model)
    if state.model_sha256 != mine:
        raise _AnotherModelError(
            f"{path}: expected a checkpoint of this model, whose parameters' names and shapes have "
            f"sha256 {mine}, got one of {state.model_sha256}"
        )
    for name in (MODEL, OPTIMIZER):
        tensor_infos(path / name)  # before all of it is read
        if file_sha256(path / name) != state.sha256.get(name):
            raise CheckpointError(f"{path / name}: expected the hash in {STATE}, got another")
    held = dict(model.named_parameters())
    parameters = {
        name: sharded_like(tensor, held[name])
        for name, tensor in read_tensors(path / MODEL).items()
    }
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stored: dict[int, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(path / OPTIMIZER).items():
        index, key = name.split(".")
        stored.setdefault(int(index), {})[key] = (
            sharded_like(tensor, trained[int(index)]) if tensor.dim() else tensor
        )
    model.load_state_dict(parameters, strict=False)  # a tied parameter is stored once
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": stored, "param_groups": groups})
    return state


def shapes_sha256(model: TrainableModel) -> str:
    """Return the hash of the parameters' names and shapes, which a checkpoint must match."""
    shapes = {name: list(value.shape) for name, value in model.named_parameters()}
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def _parameters(model: TrainableModel) -> dict[str, Tensor]:
    """Return the parameters by name, each once."""
    return {name: value.detach().contiguous() for name, value in model.named_parameters()}


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": value.contiguous()
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def _state_sha256(state: dict[str, Any]) -> str:
    """Return the hash of all other entries of the state."""
    rest = {name: value for name, value in state.items() if name != "state_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
