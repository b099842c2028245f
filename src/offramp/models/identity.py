"""The hash by which certificates name a model.

It covers what the model computes: weights, config, tokenizer, exits, gates and temperatures. It
does not depend on where the files are or on what else they say, so saving a model or moving its
folder keeps it.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from offramp.exits.gate import FittedExits
from offramp.models.base import TrainableModel
from offramp.models.computation import computation
from offramp.models.huggingface.exits_file import EXITS_FILE
from offramp.models.model_files import ModelFiles
from offramp.models.native.decoder import Transformer
from offramp.models.native.llama import EMBEDDING, HEAD, native_name
from offramp.models.native.quantise import weight_format


@torch.no_grad()
def model_sha256(
    model: TrainableModel, tokenizer: str, fitted: FittedExits, files: ModelFiles | None
) -> str:
    """Return the hash of an opened model; ``tokenizer`` is its serialised form.

    Weights are read from the files, so that the precision in which they were loaded does not
    matter; a model without files is hashed as it is in memory.
    """
    quantised = weight_format(model) is not None
    native = isinstance(model, Transformer) and (
        files is None or files.kind == "native" or quantised
    )
    digest = hashlib.sha256(tokenizer.encode())
    about = [_config(model, files, native), list(model.exit_layers), model.exit_head]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    weights = _in_files(files.backbone.weights) if files else _in_memory(backbone_state(model))
    if quantised:
        weights = _quantised(model, files)
    parts = [
        weights,
        _heads(model, files, native),
        _in_memory(_fitted(fitted)),
    ]
    for part in parts:
        digest.update(b"part")
        for name, tensor in part:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            whole = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(whole.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _quantised(model: TrainableModel, files: ModelFiles | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a quantised model, those that are not quantised as its files hold them.

    So a model that was quantised when it was loaded, and one whose folder holds quantised
    weights, have the same hash, whatever the precision of everything else.
    """
    numbers = {name for name, _ in model.named_parameters()}
    exact = {} if files is None else _exact(files, numbers)
    for name, tensor in sorted(backbone_state(model).items()):
        yield name, exact.get(name, tensor).float() if name in numbers else tensor


def _exact(files: ModelFiles, wanted: Collection[str]) -> dict[str, Tensor]:
    """Return the stored tensors of these names in a native decoder."""
    exits = (files.own / EXITS_FILE,) if files.kind == "exits" and files.own else ()
    found = {
        native_name(name): tensor
        for name, tensor in _in_files((*files.backbone.weights, *exits))
        if native_name(name) in wanted or native_name(name) == HEAD
    }
    if HEAD in found:  # a tied checkpoint may hold only this one
        found.setdefault(EMBEDDING, found[HEAD])
    return found


def backbone_state(model: TrainableModel) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of the model's backbone holds, by their names there.

    A native model's own exits are among them; a tied LM head is not.
    """
    if isinstance(model, Transformer):
        state = model.state_dict()
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        return state
    return state_of(model.to_transformers())


def state_of(backbone: Any) -> dict[str, Tensor]:
    """Return the tensors of a model of ``transformers`` by name, without a tied LM head."""
    state = backbone.state_dict()
    shared = backbone.get_input_embeddings().weight.data_ptr()
    kept = next((name for name, value in state.items() if value.data_ptr() == shared), None)
    return {
        name: value for name, value in state.items() if name == kept or value.data_ptr() != shared
    }


def _config(model: TrainableModel, files: ModelFiles | None, native: bool) -> Mapping[str, Any]:
    """What the config says of the computation; of a Llama-family one, what the decoder reads."""
    if native:
        assert isinstance(model, Transformer)
        return model.config.stored()
    backbone: Any = None if files else model.to_transformers()
    stored = files.config if files else json.loads(backbone.config.to_json_string())
    return computation(stored)


def _heads(
    model: TrainableModel, files: ModelFiles | None, native: bool
) -> Iterator[tuple[str, Tensor]]:
    """The exits' own parameters; those of a native model are among its weights."""
    if native:
        return iter(())
    if files is not None and files.kind == "exits":
        assert files.own is not None
        stored = _in_files((files.own / EXITS_FILE,))
        return ((name, value) for name, value in stored if name.startswith("exits."))
    return _in_memory({f"exits.{name}": value for name, value in model.exits.state_dict().items()})


def _fitted(fitted: FittedExits) -> dict[str, Tensor]:
    tensors = {
        f"{kind}.{layer}.{name}": value
        for kind, gates in fitted.gates.items()
        for layer, gate in gates.items()
        for name, value in gate.state_dict().items()
    }
    for layer, temperature in fitted.temperatures.items():
        tensors[f"temperature.{layer}"] = torch.tensor(temperature, dtype=torch.float64)
    return tensors


def _in_memory(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return iter(sorted(tensors.items()))


def _in_files(paths: tuple[Path, ...]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of safetensors files, by name, one at a time."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        for name in sorted(where):
            yield name, where[name].get_tensor(name)
