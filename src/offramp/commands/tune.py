"""From a pretrained checkpoint to one with trained exits: ``offramp tune``."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from offramp.commands.text import LARGEST_LOGITS
from offramp.commands.tune_config import TuneConfig
from offramp.commands.tune_gates import gates_of
from offramp.commands.tune_shared import about_shared, open_to_share, share
from offramp.data import Corpus, batches, encode, load_corpus
from offramp.environment import environment
from offramp.errors import CheckpointError, CorpusError
from offramp.evaluation.trace import collect_trace
from offramp.exits.gate import FittedExits
from offramp.exits.weightings import parse_loss_weights
from offramp.folders import check_free, new_folder
from offramp.models.base import EarlyExitModel, TrainableModel
from offramp.models.model_files import find_model
from offramp.models.open import OpenedModel, open_model
from offramp.models.save import write_model
from offramp.training.frozen import TuneProgress, check_exits, tune_exits
from offramp.training.kv_fit import check_source
from offramp.training.loop import Progress, train

HELD_OUT_SHARE, HELD_OUT_MOST = 20, 4096
"""One token in so many at the end of the text is held out, but no more than so many."""
DRAFT_VOCAB = 4096
"""Tokens that drafts may name, at the most."""


OnProgress = Callable[[TuneProgress], None]


def open_for_tuning(
    name: str | Path,
    config: TuneConfig,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> OpenedModel:
    """Open a plain checkpoint with the new exits of ``config``, run by transformers.

    With ``kv_source`` the native decoder runs it, and a model of ``offramp train`` may be opened.
    """
    files = find_model(name)
    files.require_numbers("since tune trains")
    if files.kind == "exits":
        raise CheckpointError(f"{files.name}: expected a model without exits, got one with exits")
    if config.kv_source is not None:
        return open_to_share(files, config, device=device, dtype=dtype)
    if files.kind == "native":
        raise CheckpointError(
            f"{files.name}: expected a Hugging Face checkpoint, got a model of offramp train, "
            "whose exits that command trains"
        )
    return open_model(
        files,
        runner="transformers",
        exit_layers=config.exit_layers,
        exit_head=config.exit_head,
        device=device,
        dtype=dtype,
    )


def tune(
    opened: OpenedModel,
    corpus_name: str,
    out: Path,
    config: TuneConfig,
    *,
    on_progress: OnProgress = lambda progress: None,
) -> dict[str, Any]:
    """Train a model's exits on the whole of a text, or its training split.

    The new folder ``out`` gets ``offramp.json`` and ``exits.safetensors``, and with ``unfreeze``
    the backbone too; with ``kv_source`` it is the folder of a native model. Returns what
    ``offramp.json`` (or ``config.json``) holds under ``trained``: among others the agreement with
    the final layer and the PPL by exit layer, before and after, on tokens at the end of the text
    that nothing was trained on.
    """
    check_free(out)
    corpus = load_corpus(corpus_name)
    text = corpus.whole if corpus.test is None else corpus.train
    model, tokenizer = opened.model, opened.tokenizer
    ids = encode(tokenizer, text)[: config.tokens]
    if len(ids) < 2:
        raise CorpusError(f"{corpus_name}: expected at least 2 tokens, got {len(ids)}")
    if config.kv_source is not None:
        check_source(model, config.kv_source)
        check_exits(model)
    elif config.unfreeze:
        parse_loss_weights(
            config.joint(model.exit_layers).loss_weights,
            num_layers=model.num_layers,
            exit_layers=model.exit_layers,
        )
    else:
        check_exits(model)
    held_out = min(len(ids) // HELD_OUT_SHARE, HELD_OUT_MOST)
    with new_folder(out) as folder:
        about = {} if config.kv_source is None else about_shared(opened)
        opened, trained = _trained(opened, corpus, ids, held_out, config, on_progress)
        opened, trained["fitted_gates"] = _fitted(
            opened, ids[: len(ids) - held_out], config, on_progress
        )
        write_model(opened, folder, about={**about, "trained": trained})
    return trained


def _trained(
    opened: OpenedModel,
    corpus: Corpus,
    ids: Int[Tensor, " N"],
    held_out: int,
    config: TuneConfig,
    on_progress: OnProgress,
) -> tuple[OpenedModel, dict[str, Any]]:
    """Train the exits, and return the model and the record of its training, with figures."""
    model = opened.model
    model.silence_untrained()  # the exits are about to be trained
    first = opened.first_tokens
    figures = partial(
        measure, ids=ids[len(ids) - held_out :], seq_len=config.seq_len, first_tokens=first
    )
    before = figures(model)
    shared: dict[str, Any] = {}
    jointly = config.unfreeze and config.kv_source is None
    if config.kv_source is not None:
        opened, shared["shared_kv"] = share(
            opened,
            ids[: len(ids) - held_out],
            config,
            ppl=lambda model: next((row["ppl"] for row in figures(model)[-1:]), None),
            on_progress=on_progress,
        )
        model = opened.model
    elif jointly:
        _tune_jointly(model, ids, held_out, config, first, on_progress)
    else:
        tune_exits(
            model,
            ids[: len(ids) - held_out],
            config.frozen(),
            first_tokens=first,
            on_progress=on_progress,
        )
    return opened, {
        **asdict(config),
        **shared,
        "exit_layers": list(model.exit_layers),
        "objective": config.objective or ("text" if jointly else "distill"),
        "tokens": len(ids),
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "read": "whole" if corpus.test is None else "training split",
        },
        "held_out_tokens": held_out,
        "before": before,
        "after": figures(model),
        "bos": bool(first),
        "environment": environment(str(model.device)),
    }


def _fitted(
    opened: OpenedModel, ids: Int[Tensor, " N"], config: TuneConfig, on_progress: OnProgress
) -> tuple[OpenedModel, dict[str, Any] | None]:
    """Return the model with gates and a draft vocabulary, and a record of the gates."""
    fitted, record = opened.fitted, None
    if config.gates:
        gates, record = gates_of(
            opened.model,
            ids,
            seq_len=config.seq_len,
            seed=config.seed,
            first_tokens=opened.first_tokens,
            on_progress=on_progress,
        )
        fitted = FittedExits(gates=gates, bos=bool(opened.first_tokens))
    if opened.model.vocab_size > 2 * DRAFT_VOCAB:
        fitted = replace(fitted, draft_vocab=frequent_tokens(ids))
    return replace(opened, fitted=fitted), record


def frequent_tokens(ids: Int[Tensor, " N"]) -> Int[Tensor, " W"]:
    """The tokens that stand most often in a text, in falling order."""
    tokens, counts = ids.unique(return_counts=True)
    chosen: Tensor = tokens[counts.argsort(descending=True, stable=True)][:DRAFT_VOCAB]
    return chosen


def measure(
    model: EarlyExitModel, ids: Int[Tensor, " N"], seq_len: int, first_tokens: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Agreement with the final layer and PPL of each exit; empty without tokens to predict."""
    if len(ids) < 2:
        return []
    seq_len = min(seq_len, max(1, model.max_length - len(first_tokens)))
    rows = max(1, min(8, LARGEST_LOGITS // (seq_len * model.vocab_size)))
    trace = collect_trace(model, batches(ids, seq_len=seq_len, batch_size=rows, first=first_tokens))
    return [
        {
            "exit_layer": layer,
            "agreement": float((trace.argmax[row] == trace.argmax[-1]).mean()),
            "ppl": trace.ppl(layer),
        }
        for row, layer in enumerate(trace.exit_layers)
    ]


def _tune_jointly(
    model: TrainableModel,
    ids: Tensor,
    held_out: int,
    config: TuneConfig,
    first_tokens: Sequence[int],
    on_progress: OnProgress,
) -> None:
    def on_step(progress: Progress) -> None:
        on_progress(
            TuneProgress(
                doing="tune",
                done=progress.step,
                total=progress.total_steps,
                loss=progress.loss.detach(),
            )
        )

    model.exits.trained = True
    model.requires_grad_(True)
    validation = ids[len(ids) - max(held_out, 2) :]
    joint = config.joint(model.exit_layers)
    longest = max(1, model.max_length - len(first_tokens))
    if first_tokens and joint.seq_len > longest:
        joint = replace(joint, seq_len=longest)
    train(
        model,
        ids[: len(ids) - held_out],
        validation,
        joint,
        on_step=on_step,
        first_tokens=first_tokens,
    )
