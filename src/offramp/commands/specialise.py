"""Teach a trained model's exits the tokens that leave there: ``offramp specialise``."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from offramp.calibration.specialise import (
    SpecialiseConfig,
    check_specialise,
    specialise_exits,
    with_own_heads,
)
from offramp.commands.confidence import fit_folder
from offramp.commands.sweep import LARGEST_LOGITS, SWEEP_BATCH, window_length
from offramp.data import batches, encode, load_corpus
from offramp.data.tokenizer import TOKENIZER_FILE
from offramp.errors import CheckpointError, CorpusError
from offramp.evaluation.trace import collect_trace
from offramp.files import claim_folder
from offramp.models.base import EarlyExitModel
from offramp.models.native.checkpoint import load_checkpoint, save_checkpoint
from offramp.models.open import check_vocabulary, is_native, load_tokenizer


def specialise_folder(
    folder: Path,
    corpus_name: str,
    out: Path,
    config: SpecialiseConfig,
    *,
    device: str = "cpu",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """A new model folder with specialised exits, and gates that were fitted to them.

    Exits learn from the corpus's training text; returned are the share of its tokens that left
    at each exit at the budget, and each exit's PPL on the validation text before and after.
    Raises CheckpointError for what is no model of offramp train, CorpusError for too little
    text, and the ConfigErrors of ``specialise_exits``.
    """
    if not is_native(folder):
        raise CheckpointError(f"{folder}: expected a model of offramp train, got none")
    model, about = load_checkpoint(folder, device=device)
    tokenizer, corpus = load_tokenizer(folder), load_corpus(corpus_name)
    check_vocabulary(folder, tokenizer, model)
    train_ids, validation_ids = (
        encode(tokenizer, text) for text in (corpus.train, corpus.validation)
    )
    if len(train_ids) < 2 or len(validation_ids) < 2:
        raise CorpusError(f"{corpus_name}: expected at least 2 tokens to train and to validate")
    seq_len = window_length(folder, model)
    rows = max(1, min(SWEEP_BATCH, LARGEST_LOGITS // (seq_len * model.vocab_size)))

    def exit_ppl(model: EarlyExitModel) -> dict[int, float]:
        trace = collect_trace(model, batches(validation_ids, seq_len=seq_len, batch_size=rows))
        return {layer: trace.ppl(layer) for layer in model.exit_layers}

    own = with_own_heads(model, seed=config.seed)
    check_specialise(own, config, context=(seq_len + 1) / 2)
    claim_folder(out)
    before = exit_ppl(model)
    on_stage("exits learn from the tokens that leave there")
    order = torch.Generator().manual_seed(config.seed + 1)  # the gates' sample is another
    left = specialise_exits(
        own,
        batches(train_ids, seq_len=seq_len, batch_size=rows, order=order),
        config,
    )
    specialised = {**asdict(config), "corpus": {"name": corpus.name, "sha256": corpus.sha256}}
    kept = {name: part for name, part in about.items() if name not in ("format", "model")}
    save_checkpoint(own, out, about={**kept, "specialised": specialised}, weights_about={})
    shutil.copyfile(folder / TOKENIZER_FILE, out / TOKENIZER_FILE)
    on_stage("gates and temperatures are fitted to the new exits")
    fit_folder(out, corpus_name, device=device)
    return {"left": left, "before": before, "after": exit_ppl(own)}
