"""From a corpus to a model folder, and from a model folder to a sweep."""

import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from offramp.data import batches, character_tokenizer, count_unknown, encode, load_corpus
from offramp.errors import CheckpointError, CorpusError
from offramp.evaluation.sweep import Threshold, sweep
from offramp.evaluation.trace import collect_trace
from offramp.exits.weights import RECOMMENDED, parse_loss_weights
from offramp.models.checkpoint import claim_folder, load_checkpoint, save_checkpoint
from offramp.models.transformer import DecoderConfig, Transformer
from offramp.training import Progress, TrainConfig, TrainResult, Validation, new_model, train
from offramp.version import __version__

TOKENIZER_FILE = "tokenizer.json"
SWEEP_BATCH = 32


def resolve(model: DecoderConfig, training: TrainConfig) -> tuple[DecoderConfig, TrainConfig]:
    """Give ``recommended`` its exit layer and its threshold; check the loss weights."""
    if training.loss_weights == "recommended":
        exits = (RECOMMENDED.exit_layer, *model.exit_layers)
        model = replace(model, exit_layers=exits)
        if training.select_at is None:
            training = replace(training, select_at=RECOMMENDED.threshold)
    parse_loss_weights(
        training.loss_weights, num_layers=model.num_hidden_layers, exit_layers=model.exit_layers
    )
    return model, training


def train_to_folder(
    corpus_name: str,
    model_config: DecoderConfig,
    training: TrainConfig,
    out: Path,
    *,
    device: str = "cpu",
    on_step: Callable[[Progress], None] | None = None,
    on_validation: Callable[[Validation], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train a native decoder on a corpus, one character a token.

    ``out`` gets the best parameters by validation as soon as they are known
    (``model.safetensors``, ``config.json``, ``tokenizer.json``), and the last in ``last/``.
    """
    model_config, training = resolve(model_config, training)
    corpus = load_corpus(corpus_name)
    tokenizer = character_tokenizer(corpus.train)
    train_ids, validation_ids = (
        encode(tokenizer, text) for text in (corpus.train, corpus.validation)
    )
    needed = training.seq_len * training.batch_size + 1
    if len(train_ids) < needed or len(validation_ids) < 2:
        raise CorpusError(
            f"{corpus_name}: expected at least {needed} training characters (one batch of "
            f"{training.batch_size} x {training.seq_len}) and 2 to validate, "
            f"got {len(train_ids)} and {len(validation_ids)}"
        )
    model_config = replace(
        model_config,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=max(model_config.max_position_embeddings, training.seq_len),
    )
    claim_folder(out)
    model = new_model(model_config, seed=training.seed).to(device)
    about = {
        "training": asdict(training),
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "split": corpus.split,
            "train_tokens": len(train_ids),
            "validation_tokens": len(validation_ids),
            "unknown_validation_tokens": count_unknown(tokenizer, validation_ids),
        },
        "environment": environment(device),
        "offramp_version": __version__,
    }

    def validated(validation: Validation) -> None:
        if validation.is_best:
            _save(model, tokenizer, out, about, validation)
        if on_validation:
            on_validation(validation)

    result = train(
        model,
        train_ids,
        validation_ids,
        training,
        on_step=on_step,
        on_validation=validated,
        should_stop=should_stop,
    )
    aside = out / ".last.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    _save(model, tokenizer, aside, about, result.validations[-1])
    aside.rename(out / "last")
    return result


def _save(
    model: Transformer,
    tokenizer: Tokenizer,
    folder: Path,
    about: dict[str, Any],
    validation: Validation,
) -> None:
    tokenizer.save(str(folder / TOKENIZER_FILE))
    where = {"step": str(validation.step), "validation_score": repr(validation.score)}
    save_checkpoint(model, folder, about=about, weights_about=where)


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What ``offramp sweep`` writes, and what it must say beside its table."""

    content: dict[str, Any]
    unknown_tokens: int


def sweep_folder(
    folder: Path,
    corpus_name: str,
    thresholds: Sequence[Threshold],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    on_tokens: Callable[[int, int], None] | None = None,
) -> SweepResult:
    """Sweep the thresholds over the whole text of a corpus; one pass of the model.

    ``on_tokens`` is told (tokens done, tokens in all).
    """
    model, about = load_checkpoint(folder, device=device, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    corpus = load_corpus(corpus_name)
    ids = encode(tokenizer, corpus.whole)
    if len(ids) < 2:
        raise CorpusError(f"{corpus_name}: expected at least 2 tokens, got {len(ids)}")
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        if on_tokens:
            on_tokens(done, len(ids) - 1)

    windows = batches(ids, seq_len=about["training"]["seq_len"], batch_size=SWEEP_BATCH)
    trace = collect_trace(model, windows, on_tokens=count)
    unknown = count_unknown(tokenizer, ids)
    content = {
        "num_layers": model.num_layers,
        "exit_layers": list(model.exit_layers),
        "n_tokens": trace.num_tokens,
        "unknown_tokens": unknown,
        "missing_kv": "recompute",
        "corpus": {"name": corpus.name, "sha256": corpus.sha256},
        "rows": [asdict(row) for row in sweep(trace, thresholds)],
        "exit_ppl": {layer: trace.ppl(layer) for layer in trace.exit_layers},
    }
    return SweepResult(content=content, unknown_tokens=unknown)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder."""
    path = folder / TOKENIZER_FILE
    if not path.exists():
        raise CheckpointError(f"{path}: expected the model's tokenizer, found none")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: expected a tokenizer, got: {error}") from None


def environment(device: str) -> dict[str, Any]:
    """What a figure may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
    }
