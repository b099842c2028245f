"""Backbones with an adapter of the library peft, such as LoRA: in training, and merged on load.

A folder with an adapter holds the adapter's files and the exits; ``offramp.json`` names the
backbone, and the hashes of both. When it is opened, the adapter is merged into the backbone's
weights once, and the merged checkpoint is kept in the cache folder. Whatever opens a checkpoint can
then open it.
"""

import hashlib
import importlib
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from offramp.cache import cache_folder
from offramp.data.hub import one_line
from offramp.errors import CheckpointError, ConfigError
from offramp.files import file_sha256, reason
from offramp.models.huggingface.backbone import load_backbone, save_backbone
from offramp.models.huggingface.library import quiet
from offramp.models.sources import Source, find_checkpoint
from offramp.models.weights import DTYPES
from offramp.reading import parsing, read_json
from offramp.schema import shown

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_HASHES = {"adapter_config_sha256": CONFIG_FILE, "adapter_sha256": WEIGHTS_FILE}


def peft() -> Any:
    """Return the library peft, which is imported on first use."""
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise CheckpointError(
            "adapter: expected the library peft, which is not installed; "
            "pip install 'offramp[lora]'"
        ) from None


def backbone_of(model: Any) -> Any:
    """Return the causal language model inside a ``PeftModel``, with its adapter; or the model.

    Raises ConfigError for an adapter that changes more than the model's blocks.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            "model: expected an adapter that peft.get_peft_model added, got one of add_adapter"
        )
    if not is_adapted(model):
        return model
    if list(model.peft_config) != ["default"]:
        raise ConfigError(
            "model: expected one adapter with the name 'default', got "
            f"{', '.join(map(repr, model.peft_config))}"
        )
    if model.peft_config["default"].is_prompt_learning:
        raise ConfigError(
            "model: expected an adapter that changes weights, such as LoRA, got one that learns "
            "a prompt"
        )
    backbone = model.get_base_model()
    head = backbone.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or hasattr(head, "base_layer"):
        raise ConfigError(
            "model: expected an adapter that leaves the LM head as it is, since exits use it, "
            f"got one with a {type(head).__name__} as LM head"
        )
    return backbone


def is_adapted(model: Any) -> bool:
    """Return whether this is a ``PeftModel``."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def checkpoint_under(model: Any) -> Source:
    """Return the checkpoint from which the backbone of a ``PeftModel`` was loaded.

    Raises ConfigError if there is none, or if the backbone has other parameters than it.
    """
    backbone = model.get_base_model()
    name = str(getattr(backbone, "name_or_path", "") or "")
    why = (
        "model: expected the adapter of a model that was loaded from a checkpoint, which the saved "
        f"folder can name, got one from {name!r}"
    )
    try:
        source = find_checkpoint(name)
    except CheckpointError as error:
        raise ConfigError(f"{why}: {error}") from None
    if (other := _other_than(source, backbone)) is not None:
        raise ConfigError(f"{why}, whose {other} is another one than the model's")
    return source


def _other_than(source: Source, backbone: Any) -> str | None:
    """Return the name of a parameter that is not that of the checkpoint, by its first row."""
    own = {
        name.replace(".base_layer.", "."): value for name, value in backbone.state_dict().items()
    }
    for path in source.weights:
        with parsing(path, "whole safetensors"), safe_open(path, framework="pt") as file:
            for name in own.keys() & set(file.keys()):
                mine, stored = own[name], file.get_slice(name)
                if not (mine.is_floating_point() and mine.ndim):  # quantised, or a buffer
                    continue
                same = tuple(stored.get_shape()) == tuple(mine.shape)
                if not (same and torch.equal(stored[:1].to(mine.dtype), mine[:1].cpu())):
                    return str(name)
    return None


def adapter_hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of an adapter's files in a folder, as ``offramp.json`` holds them."""
    return {key: file_sha256(folder / name) for key, name in _HASHES.items()}


def with_adapter(base: Source, folder: Path, about: Mapping[str, Any]) -> Source:
    """Return the checkpoint of a folder's backbone; with its adapter, if it has one.

    ``about`` is the content of ``read_exits``. Raises CheckpointError for files that are not
    those of ``offramp.json``, and if peft is not installed or cannot merge them.
    """
    stored = about["base"]
    if stored.get("adapter_sha256") is None:
        return base
    for key, name in _HASHES.items():
        if (found := file_sha256(folder / name)) != stored.get(key):
            raise CheckpointError(
                f"{folder / name}: expected the adapter of offramp.json, sha256 {stored.get(key)}, "
                f"got {found}"
            )
    config = read_json(folder / CONFIG_FILE)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: peft_type: expected LORA, got {shown(kind)}; merge it into "
            "its base model first (merge_and_unload)"
        )
    parts = (base.sha256, *(stored[key] for key in _HASHES), about["dtype"])
    name = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    merged = cache_folder("models") / f"merged-{name}"
    if not merged.is_dir():
        _merge(base, folder, DTYPES[about["dtype"]], merged)
    return Source(id=str(folder), folder=merged)


def _merge(base: Source, folder: Path, dtype: torch.dtype, merged: Path) -> None:
    """Write the merged checkpoint, completely or not at all."""
    library = peft()
    backbone = load_backbone(base, dtype)
    aside = merged.with_name(f".{merged.name}.{os.getpid()}.tmp")
    try:
        with (
            quiet(),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # of peft's calls of transformers
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = library.PeftModel.from_pretrained(backbone, str(folder))
            plain = adapted.merge_and_unload()
    except Exception as error:  # the library raises many kinds of errors
        raise CheckpointError(
            f"{folder}: its adapter cannot be merged into {base.id}: {one_line(error)}"
        ) from None
    try:
        aside.mkdir(parents=True, exist_ok=True)
        save_backbone(plain, aside, texts=base.folder)
        with suppress(OSError):  # another process was first
            aside.rename(merged)
    except OSError as error:
        raise CheckpointError(f"{merged}: cannot be written: {reason(error)}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
