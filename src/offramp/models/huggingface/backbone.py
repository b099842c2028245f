"""Load and save causal language models of ``transformers`` as plain checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import torch

from offramp.data.hub import one_line
from offramp.errors import CheckpointError, UnsupportedArchitectureError
from offramp.files import count_tensors, obey_umask, read_json
from offramp.models.huggingface.library import quiet, transformers
from offramp.models.sources import Source

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names of the number of layers in a config, which a library may try to make, however many."""
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
    """Load the causal language model of a checkpoint, which must contain every weight."""
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
    tensors = sum(count_tensors(file) for file in source.weights)
    parts = [part for part in (stored, stored.get("text_config")) if isinstance(part, dict)]
    for name, layers in ((name, part[name]) for part in parts for name in _LAYERS if name in part):
        if type(layers) is not int or not 1 <= layers <= tensors:
            raise CheckpointError(
                f"{path}: {name}: expected 1 to {tensors}, the number of stored parameters, "
                f"got {layers!r}"
            )
    with quiet():
        try:
            config = library.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        except Exception as error:  # the library raises many kinds of errors
            raise CheckpointError(f"{path}: expected a config, got: {one_line(error)}") from None
        encodes = getattr(config, "is_encoder_decoder", False)
        if encodes or type(config) not in library.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UnsupportedArchitectureError(
                f"{source.id}: expected a decoder-only (causal) language model, got "
                f"{config.model_type}{', an encoder-decoder model' if encodes else ''}"
            )
        try:
            model, report = library.AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported and refused below, with their names
            )
        except Exception as error:
            raise CheckpointError(f"{source.id}: cannot be loaded: {one_line(error)}") from None
    for problem in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(map(str, report[problem])):
            raise CheckpointError(
                f"{source.id}: the weights do not fit config.json: {problem.replace('_', ' ')} "
                f"{', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}"
            )
    return model


def save_backbone(backbone: Any, folder: Path, *, texts: Path | None) -> None:
    """Write a model of ``transformers`` as a plain checkpoint into an existing folder.

    The tokenizer is copied from the folder ``texts``. The folder may be the one from which the
    model was loaded.
    """
    aside = folder / ".backbone.tmp"  # the old files may be mapped into memory
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with quiet():
            backbone.save_pretrained(aside)
        if texts is not None and texts.resolve() != folder.resolve():
            for kind in _TEXT_FILES:
                for path in texts.glob(kind):
                    shutil.copyfile(path, aside / path.name)
        for path in sorted(aside.iterdir()):
            obey_umask(path)
            path.replace(folder / path.name)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
