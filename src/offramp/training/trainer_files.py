"""The two files that hold the exits in a checkpoint of a trainer of ``transformers``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offramp.data.tokenizer import TOKENIZER_FILE
from offramp.errors import CheckpointError, ConfigError
from offramp.models.base import TrainableModel
from offramp.models.huggingface.adapter import adapter_hashes
from offramp.models.huggingface.backbone import copy_texts
from offramp.models.huggingface.exits_file import EXITS_JSON, load_exits, read_exits, write_exits
from offramp.models.sources import Source


def write_trained(
    model: TrainableModel, folder: Path, *, base: Source | None, trained: Mapping[str, Any]
) -> None:
    """Write the exits into a folder that holds the trained model.

    If it holds only the model's adapter, ``base`` is the checkpoint below it. Without a tokenizer
    in the folder, that of the model's checkpoint is copied, if it is a folder.
    """
    backbone = model.to_transformers()
    texts = Path(str(backbone.name_or_path))
    if (texts / TOKENIZER_FILE).is_file() and not (folder / TOKENIZER_FILE).is_file():
        copy_texts(texts, folder)
    write_exits(
        folder,
        model.exits,
        source=Source(id=str(folder), folder=folder) if base is None else base,
        exit_layers=model.exit_layers,
        exit_head=model.exit_head,
        model_type=str(backbone.config.get_text_config().model_type),
        dtype=model.dtype,
        trained=trained if model.exits_trained else None,
        policy=None,
        adapter=None if base is None else adapter_hashes(folder),
    )


def read_trained(model: TrainableModel, folder: Path) -> None:
    """Load the exits of a trainer's checkpoint into a model whose exits are of the same kind."""
    if not (folder / EXITS_JSON).is_file():
        raise CheckpointError(f"{folder}: expected a checkpoint with exits ({EXITS_JSON})")
    about = read_exits(folder)
    stored = (tuple(about["exit_layers"]), about["exit_head"])
    own = (tuple(model.exit_layers), model.exit_head)
    if stored != own:
        written = [f"{','.join(map(str, layers))} ({head})" for layers, head in (own, stored)]
        raise ConfigError(f"{folder}: expected the exits {written[0]}, got {written[1]}")
    load_exits(model.exits, folder, about)
