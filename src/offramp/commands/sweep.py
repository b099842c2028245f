"""From a model folder and a text to a sweep."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.commands.train import UNFINISHED
from offramp.data import batches, count_unknown, encode, load_corpus
from offramp.errors import CheckpointError, CorpusError
from offramp.evaluation.sweep import Threshold, sweep
from offramp.evaluation.trace import collect_trace
from offramp.exits.policy import ThresholdPolicy
from offramp.files import read_json
from offramp.models.base import EarlyExitModel
from offramp.models.open import is_native, load_model

SWEEP_BATCH = 32
SWEEP_SEQ_LEN = 256
LARGEST_LOGITS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What ``offramp sweep`` writes, and what it must say beside its table."""

    content: dict[str, Any]
    unknown_tokens: int
    unfinished: bool
    "The model is the best so far of a run that has not ended."
    untrained: bool = False
    "Nobody has trained the model's exits."


def sweep_folder(
    folder: Path,
    corpus_name: str,
    thresholds: Sequence[Threshold],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    on_tokens: Callable[[int, int], None] | None = None,
) -> SweepResult:
    """Sweep the thresholds over a text in one pass of any model that ``load_model`` takes.

    The text is the corpus's test split if it has a named one, else the whole corpus.

    ``on_tokens`` is told (tokens done, tokens in all).
    """
    if (folder / UNFINISHED).exists() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: expected a model, but the run there is unfinished and has not validated "
            f"yet; go on with it by offramp train --resume {folder}"
        )
    model, tokenizer = load_model(folder, device=device, dtype=dtype)
    untrained = not model.exits.trained
    model.exits.warned = True  # it is in the result
    seq_len = window_length(folder, model)
    for threshold in thresholds:
        ThresholdPolicy.of(threshold, len(model.exit_layers))
    corpus = load_corpus(corpus_name)
    ids = encode(tokenizer, corpus.whole if corpus.test is None else corpus.test)
    if len(ids) < 2:
        raise CorpusError(f"{corpus_name}: expected at least 2 tokens, got {len(ids)}")
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        if on_tokens:
            on_tokens(done, len(ids) - 1)

    rows = max(1, min(SWEEP_BATCH, LARGEST_LOGITS // (seq_len * model.vocab_size)))
    windows = batches(ids, seq_len=seq_len, batch_size=rows)
    trace = collect_trace(model, windows, on_tokens=count)
    if not np.isfinite(trace.nll).any():
        raise CheckpointError(f"{folder}: expected finite losses, got none; are the weights NaN?")
    unknown = count_unknown(tokenizer, ids)
    content = {
        "num_layers": model.num_layers,
        "exit_layers": list(model.exit_layers),
        "n_tokens": trace.num_tokens,
        "unknown_tokens": unknown,
        "missing_kv": "recompute",
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "read": "whole" if corpus.test is None else "test split",
        },
        "rows": [asdict(row) for row in sweep(trace, thresholds)],
        "exit_ppl": {layer: trace.ppl(layer) for layer in trace.exit_layers},
    }
    return SweepResult(
        content=content,
        unknown_tokens=unknown,
        unfinished=(folder / UNFINISHED).exists(),
        untrained=untrained,
    )


def window_length(folder: Path, model: EarlyExitModel) -> int:
    """How many tokens a window has: what the model was trained on, or 256 where it says nothing."""
    training = read_json(folder / "config.json").get("training") if is_native(folder) else None
    if training is None:
        return min(SWEEP_SEQ_LEN, model.max_length)
    seq_len = training.get("seq_len") if isinstance(training, dict) else None
    if not isinstance(seq_len, int) or seq_len < 1:
        raise CheckpointError(
            f"{folder / 'config.json'}: expected training.seq_len of at least 1, got {seq_len!r}"
        )
    return seq_len
