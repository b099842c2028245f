"""Save an opened model to a folder that ``open_model`` can read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offramp.data.tokenizer import TOKENIZER_FILE
from offramp.exits.gate import NOTHING_FITTED
from offramp.files import claim_folder
from offramp.models.fitted import save_fitted
from offramp.models.huggingface.exits_file import save_exits, write_exits
from offramp.models.huggingface.model import HuggingFaceModel
from offramp.models.native.checkpoint import save_checkpoint
from offramp.models.native.decoder import Transformer
from offramp.models.open import OpenedModel


def save_model(
    opened: OpenedModel, out: str | Path, *, about: Mapping[str, Any] | None = None
) -> None:
    """Write a model, its tokenizer and its fitted gates and temperatures into a new folder.

    If the backbone of a pretrained model is unchanged, only the exits are saved, with the name of
    their checkpoint; otherwise the whole model is saved. ``about`` is added to the training
    record in ``config.json`` or ``offramp.json``. Raises CheckpointError if the folder is not
    empty or cannot be written.
    """
    out = Path(out)
    claim_folder(out)
    model, files = opened.model, opened.files
    stored = {**(files.about if files else {}), **(about or {})}
    trained = stored.get("trained")
    if "specialised" in stored:  # in addition to the first training of the exits
        trained = {**(trained or {}), "specialised": stored["specialised"]}
    if isinstance(model, HuggingFaceModel):
        save_exits(
            model,
            out,
            trained=trained,
            policy=stored.get("policy"),
            backbone=True if model.source is None else None,
        )
    elif files is not None and files.kind != "native":
        assert isinstance(model, Transformer)
        write_exits(
            out,
            model.exits,
            source=files.backbone,
            exit_layers=model.exit_layers,
            exit_head=model.config.exit_head,
            model_type=str(files.config.get("model_type")),
            dtype=model.lm_head.weight.dtype,
            trained=trained,
            policy=stored.get("policy"),
        )
    else:
        assert isinstance(model, Transformer)
        kept = {name: part for name, part in stored.items() if name not in ("format", "model")}
        save_checkpoint(model, out, about=kept, weights_about={})
    if files is None or files.kind == "native":
        opened.tokenizer.save(str(out / TOKENIZER_FILE))
    if opened.fitted is not NOTHING_FITTED:
        save_fitted(opened.fitted, out)
