"""Save an opened model to a folder that ``open_model`` can read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from offramp.data.tokenizer import save_tokenizer
from offramp.exits.gate import NOTHING_FITTED
from offramp.files import file_sha256
from offramp.folders import new_folder
from offramp.models.base import TrainableModel
from offramp.models.fitted import save_fitted
from offramp.models.huggingface.backbone import copy_texts, load_backbone, save_backbone
from offramp.models.huggingface.exits_file import write_exits
from offramp.models.identity import backbone_state, state_of
from offramp.models.native.checkpoint import save_checkpoint
from offramp.models.native.decoder import Transformer
from offramp.models.open import OpenedModel
from offramp.models.sources import Source


def save_model(
    opened: OpenedModel, out: str | Path, *, about: Mapping[str, Any] | None = None
) -> None:
    """Write a model, its tokenizer and its fitted gates and temperatures into a new folder.

    If the backbone of a pretrained model is that of a checkpoint elsewhere, only the exits are
    saved, with the name of their checkpoint; otherwise the whole model is saved. ``about`` is
    added to the training record in ``config.json`` or ``offramp.json``. Raises CheckpointError if
    the folder is not empty or cannot be written.
    """
    with new_folder(Path(out)) as folder:
        write_model(opened, folder, about=about)


def write_model(opened: OpenedModel, out: Path, *, about: Mapping[str, Any] | None = None) -> None:
    """Write what ``save_model`` writes into an existing, empty folder."""
    model, files = opened.model, opened.files
    stored = {**(files.about if files else {}), **(about or {})}
    native = files is None or files.kind == "native" or opened.weights is not None
    if isinstance(model, Transformer) and native:
        scheme = {} if opened.weights is None else {"weight_format": opened.weights}
        save_checkpoint(model, out, about=_about_native(opened, stored), weights_about=scheme)
        if scheme and files is not None:  # a chat template, too
            copy_texts(files.tokenizer_folder, out)
        save_tokenizer(opened.tokenizer, out)
        exits = file_sha256(out / "model.safetensors")
    else:
        exits = _save_pretrained(opened, out, stored)
    if opened.fitted is not NOTHING_FITTED:
        save_fitted(opened.fitted, out, exits=exits)


def _about_native(opened: OpenedModel, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``config.json`` keeps beside the model's own config.

    The folder of a pretrained model with quantised weights says that it is one, and what its
    files said of texts and exits.
    """
    files = opened.files
    if files is None or files.kind == "native":
        kept = {name: part for name, part in stored.items() if name not in ("format", "model")}
    else:
        kept = {"pretrained": True, "trained": stored.get("trained")}
        if opened.end_tokens:
            kept["eos_token_id"] = list(opened.end_tokens)
        if type(begin := files.config.get("bos_token_id")) is int:
            kept["bos_token_id"] = begin
    if opened.weights is not None:
        kept |= {"dtype": opened.precision, "exits_trained": opened.exits_trained}
    return kept


def _save_tokenizer(opened: OpenedModel, out: Path) -> None:
    """Write the tokenizer of a model in memory, with its chat template if it has one."""
    if opened.chat_tokenizer is not None:
        opened.chat_tokenizer.save_pretrained(out)
    save_tokenizer(opened.tokenizer, out)


def _save_pretrained(opened: OpenedModel, out: Path, stored: Mapping[str, Any]) -> str:
    """Write a pretrained model or its exits; returns the hash of the exits' file."""
    model, files = opened.model, opened.files
    trained = stored.get("trained")
    if trained is None and model.exits_trained:  # in memory
        trained = {}
    if "specialised" in stored:  # in addition to the first training of the exits
        trained = {**(trained or {}), "specialised": stored["specialised"]}
    lm: Any = model.to_transformers()
    source = None if files is None or files.holds_backbone else files.backbone
    if source is None or not _unchanged(model, source):
        save_backbone(lm, out, texts=files.tokenizer_folder if files else None)
        source = Source(id=str(out), folder=out)
    if files is None:
        _save_tokenizer(opened, out)
    return write_exits(
        out,
        model.exits,
        source=source,
        exit_layers=model.exit_layers,
        exit_head=model.exit_head,
        model_type=str(lm.config.model_type),
        dtype=model.dtype,
        trained=trained,
        policy=stored.get("policy"),
    )


def _unchanged(model: TrainableModel, source: Source) -> bool:
    """Whether the backbone's parameters are those of its checkpoint, in the model's precision."""
    theirs = state_of(load_backbone(source, model.dtype))
    mine = {
        name: value
        for name, value in backbone_state(model).items()
        if not name.startswith("exits.")
    }
    return mine.keys() == theirs.keys() and all(
        torch.equal(value.cpu(), theirs[name]) for name, value in mine.items()
    )
