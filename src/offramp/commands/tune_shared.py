"""A model whose upper blocks share keys and values: ``offramp tune --kv-source``."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from offramp.commands.tune_config import TuneConfig
from offramp.errors import UnsupportedArchitectureError
from offramp.exits.gate import NOTHING_FITTED
from offramp.models.model_files import ModelFiles
from offramp.models.native.decoder import Transformer
from offramp.models.open import OpenedModel, open_model
from offramp.training.distill import distil
from offramp.training.frozen import TuneProgress, tune_exits
from offramp.training.kv_fit import share_keys_values, with_config

_LEFT_OUT = ("format", "model", "specialised")
"""What the config of an offramp model says of the model itself and of its exits."""


def open_to_share(
    files: ModelFiles, config: TuneConfig, *, device: str, dtype: torch.dtype | None
) -> OpenedModel:
    """Open a plain checkpoint or a model of offramp train in the native decoder, with new exits."""
    if files.kind == "native":
        opened = open_model(files, device=device, dtype=dtype)
        model = cast(Transformer, opened.model)
        layers = model.exit_layers if config.exit_layers is None else config.exit_layers
        new = with_config(model, exit_layers=(), exit_head="shared")  # all exits begin anew
        new = with_config(new, exit_layers=layers, exit_head=config.exit_head)
        return replace(opened, model=new, fitted=NOTHING_FITTED)
    try:
        return open_model(
            files,
            runner="native",
            exit_layers=config.exit_layers,
            exit_head=config.exit_head,
            device=device,
            dtype=dtype,
        )
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(f"kv_source: {error}") from None


def share(
    opened: OpenedModel,
    ids: Int[Tensor, " N"],
    config: TuneConfig,
    *,
    ppl: Callable[[Transformer], float | None],
    on_progress: Callable[[TuneProgress], None],
) -> tuple[OpenedModel, dict[str, Any]]:
    """Return a model with shared keys and values and trained exits, and a record of the way.

    ``ppl`` measures the last layer on text that is held out. If only the last block is above the
    source, it computes what it did before, so nothing is distilled.
    """
    teacher = cast(Transformer, opened.model)
    assert config.kv_source is not None
    seq_len = min(config.seq_len, max(1, teacher.max_length - len(opened.first_tokens)))
    student = share_keys_values(
        teacher,
        ids,
        config.kv_source,
        seq_len=seq_len,
        first_tokens=opened.first_tokens,
        on_progress=lambda done, total: on_progress(
            TuneProgress(doing="fit", done=done, total=total)
        ),
    )
    student.silence_untrained()
    found = {"model": ppl(teacher), "fitted": ppl(student)}
    distillation = config.distillation() if student.cache_layers < student.num_layers else None
    if distillation is not None:
        distil(
            student,
            teacher,
            ids,
            replace(distillation, seq_len=seq_len),
            everything=config.unfreeze,
            first_tokens=opened.first_tokens,
            on_step=lambda step, total, loss: on_progress(
                TuneProgress(doing="distill", done=step, total=total, loss=loss)
            ),
        )
        found["distilled"] = ppl(student)
    tune_exits(
        student, ids, config.frozen(), first_tokens=opened.first_tokens, on_progress=on_progress
    )
    return replace(opened, model=student, fitted=NOTHING_FITTED, files=None), {"ppl": found}


def about_shared(opened: OpenedModel) -> dict[str, Any]:
    """Return what the new model's ``config.json`` keeps of the files of the model before."""
    files = opened.files
    if files is None:
        return {}
    kept: dict[str, Any] = {}
    if files.kind == "native":
        kept = {name: part for name, part in files.about.items() if name not in _LEFT_OUT}
    if opened.end_tokens:
        kept["eos_token_id"] = list(opened.end_tokens)
    if type(begin := files.config.get("bos_token_id")) is int:
        kept["bos_token_id"] = begin
    return kept
