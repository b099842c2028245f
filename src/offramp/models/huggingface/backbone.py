"""Load and save causal language models of ``transformers`` as plain checkpoints."""

import math
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from offramp.data.hub import one_line
from offramp.errors import CheckpointError, UnsupportedArchitectureError
from offramp.files import obey_umask, writing
from offramp.models.huggingface.library import quiet, transformers
from offramp.models.sources import Source
from offramp.models.weights import (
    check_types,
    is_buffer,
    refuse_tensors,
    stored_dtype,
    stored_tensors,
)
from offramp.reading import read_json
from offramp.schema import shown

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names of the number of layers in a config, which a library may try to make, however many."""
_COUNTS = (*_LAYERS, "num_labels", "encoder_layers", "decoder_layers", "depth")
_MOST = 100_000
"""Largest number of layers or of labels."""
_TIMES = 8
"""Times as many numbers as are stored, with which a model is certainly not that of the weights."""
_TEXT_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)


def load_backbone(source: Source, dtype: torch.dtype | None) -> Any:
    """Load the causal language model of a checkpoint, whose weights must be exactly the model's.

    ``dtype`` None keeps the precision that ``config.json`` states, or else that of the file.
    """
    config = _config_of(source)
    quantised = getattr(config, "quantization_config", None) is not None
    if not quantised:
        check_types(source)
        dtype = dtype or stored_dtype(source)
        _refuse_size(source, config)
    with quiet():
        try:
            model, report = transformers().AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported and refused below, with their names
            )
        except Exception as error:  # the library raises many kinds of errors
            refuse_tensors(source, {"of another size are": _of_another_size(source, config)})
            raise CheckpointError(f"{source.id}: cannot be loaded: {one_line(error)}") from None
    stored = stored_tensors(source)
    unknown = [
        name
        for name in report["unexpected_keys"]
        if not (name in stored and is_buffer(name, stored[name]))
    ]
    refuse_tensors(
        source,
        {
            "they lack": report["missing_keys"],
            "of another size are": [
                f"{name} (expected {tuple(expected)}, got {tuple(got)})"
                for name, got, expected in report["mismatched_keys"]
            ],
            "they have an unknown": unknown,
        },
    )
    _note_untied(model)
    return model


def _config_of(source: Source) -> Any:
    """Read the config of a causal language model; code that comes with it is never run."""
    library = transformers()
    path = source.folder / "config.json"
    stored = read_json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("model_type"), str):
        raise CheckpointError(f"{path}: expected the config of a model with a model_type")
    if stored["model_type"] not in library.CONFIG_MAPPING:
        raise UnsupportedArchitectureError(
            f"{source.id}: expected a model_type of transformers {library.__version__}, got "
            f"{stored['model_type']!r}; code that comes with a model is never run"
        )
    tensors = len(stored_tensors(source))
    parts = [part for part in (stored, stored.get("text_config")) if isinstance(part, dict)]
    for name, layers in ((name, part[name]) for part in parts for name in _LAYERS if name in part):
        if type(layers) is not int or not 1 <= layers <= tensors:
            raise CheckpointError(
                f"{path}: {name}: expected 1 to {tensors}, the number of stored parameters, "
                f"got {layers!r}"
            )
    _refuse_counts(stored, path)
    with quiet():
        try:
            config = library.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        except Exception as error:  # the library raises many kinds of errors
            stored_dtype(source)  # raises the error of a precision that is none
            raise CheckpointError(f"{path}: expected a config, got: {one_line(error)}") from None
    encodes = getattr(config, "is_encoder_decoder", False)
    if encodes or type(config) not in library.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedArchitectureError(
            f"{source.id}: expected a decoder-only (causal) language model, got "
            f"{config.model_type}{', an encoder-decoder model' if encodes else ''}"
        )
    return config


def _refuse_counts(stored: Any, path: Path) -> None:
    """Refuse numbers of which the library's configs make lists, in any part of a config."""
    for name, value in stored.items() if isinstance(stored, dict) else enumerate(stored):
        if name in _COUNTS and isinstance(value, int) and value > _MOST:
            raise CheckpointError(f"{path}: {name}: expected at most {_MOST}, got {shown(value)}")
        if isinstance(value, dict | list):
            _refuse_counts(value, path)


def _refuse_size(source: Source, config: Any) -> None:
    """Refuse a config of a far larger model than the weights fill, before its memory is taken."""
    needed = sum(map(math.prod, _shapes(config).values()))
    there = sum(math.prod(info.shape) for info in stored_tensors(source).values())
    if needed > _TIMES * there:
        refuse_tensors(source, {"of another size are": _of_another_size(source, config)})


def _of_another_size(source: Source, config: Any) -> list[str]:
    """Return the stored tensors whose shape is not that in a model of this config."""
    shapes, stored = _shapes(config), stored_tensors(source)
    return [name for name in stored if stored[name].shape != shapes.get(name, stored[name].shape)]


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model of this config by name; none if it cannot be made."""
    with suppress(Exception), quiet(), torch.device("meta"):  # a config that cannot be used, either
        model = transformers().AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return {}


def _note_untied(model: Any) -> None:
    """Make the config of a model whose LM head is not its embedding say so.

    ``transformers`` does not tie two stored matrices that differ, whatever the config says.
    """
    text = model.config.get_text_config()
    if not getattr(text, "tie_word_embeddings", False):
        return
    with suppress(AttributeError, NotImplementedError):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head.weight.data_ptr() != embedding.weight.data_ptr():
            model.config.tie_word_embeddings = text.tie_word_embeddings = False


def save_backbone(backbone: Any, folder: Path, *, texts: Path | None) -> None:
    """Write a model of ``transformers`` as a plain checkpoint into an existing folder.

    The tokenizer is copied from the folder ``texts``. The folder may be the one from which the
    model was loaded. Raises CheckpointError if it cannot be written, or if a file of the tokenizer
    is a link that leads out of ``texts``, and for a model inside which peft put an adapter.
    """
    if any(hasattr(module, "base_layer") for module in backbone.modules()):
        raise CheckpointError(
            f"{folder}: expected a model without an adapter to save, got one inside which peft put "
            "an adapter; merge_and_unload gives it, and load opens the folder of a trainer merged"
        )
    copied = [] if texts is None or texts.resolve() == folder.resolve() else _text_files(texts)
    aside = folder / ".backbone.tmp"  # the old files may be mapped into memory
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with quiet():
            backbone.save_pretrained(aside)
        for path in copied:
            shutil.copyfile(path, aside / path.name)
        for path in sorted(aside.iterdir()):
            obey_umask(path)
            path.replace(folder / path.name)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_texts(texts: Path, folder: Path) -> None:
    """Copy the files of a checkpoint's tokenizer from ``texts`` into ``folder``.

    Raises CheckpointError for a link that leads out of ``texts``, and if they cannot be written.
    """
    with writing(folder):
        for path in _text_files(texts):
            shutil.copyfile(path, folder / path.name)


def _text_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint's tokenizer, none of them a link to a file elsewhere.

    In the hub's cache, links lead to the folder ``blobs`` of the repository.
    """
    found = [path for kind in _TEXT_FILES for path in sorted(folder.glob(kind)) if path.is_file()]
    for path in found:
        target = path.resolve()
        blobs = target.parent
        cached = blobs.name == "blobs" and blobs.parent.name.startswith("models--")
        if not (cached or target.is_relative_to(folder.resolve())):
            raise CheckpointError(
                f"{path}: expected a file of the checkpoint to copy, got a link to {target}; "
                "replace it by the file itself"
            )
    return found
