"""A model and a text that it is to be measured on, as the commands open them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from offramp.calibration.fitting import load_fitted
from offramp.commands.sweep import LARGEST_LOGITS, SWEEP_BATCH, window_length
from offramp.commands.train import UNFINISHED
from offramp.data import Corpus, batches, count_unknown, encode, load_corpus
from offramp.errors import CheckpointError, CorpusError, UnsupportedArchitectureError
from offramp.evaluation.cost import ModelCost, model_cost
from offramp.evaluation.trace import ExitTrace, collect_trace
from offramp.exits.gate import FittedExits
from offramp.files import read_json
from offramp.models.base import EarlyExitModel
from offramp.models.huggingface.exits_file import EXITS_JSON
from offramp.models.open import load_model

OnTokens = Callable[[int, int], None]
"""Told (tokens done, tokens in all)."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A model, what was fitted to its exits, and the ids of a text."""

    folder: Path
    model: EarlyExitModel
    fitted: FittedExits
    seq_len: int
    corpus: Corpus
    ids: Int[Tensor, " N"]
    read: str
    "Which part of the corpus: whole, or its test split."
    unknown_tokens: int
    untrained: bool
    "Nobody has trained the model's exits."
    seen_in_training: bool
    "The model, or its exits, were trained on a part of what is read."

    def trace(
        self, measures: Sequence[str], *, kl: bool = False, on_tokens: OnTokens | None = None
    ) -> ExitTrace:
        """One pass of the model over the text; CheckpointError where all losses are NaN."""
        done = 0

        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            if on_tokens:
                on_tokens(done, len(self.ids) - 1)

        trace = collect_trace(
            self.model,
            self.windows(self.ids),
            measures=measures,
            fitted=self.fitted,
            kl=kl,
            on_tokens=count,
        )
        if not np.isfinite(trace.nll).any():
            raise CheckpointError(
                f"{self.folder}: expected finite losses, got none; are the weights NaN?"
            )
        return trace

    def windows(self, ids: Int[Tensor, " N"], order: torch.Generator | None = None) -> Any:
        """Batches of windows, of a size that the logits of one fit the memory."""
        a_window = self.seq_len * self.model.vocab_size
        rows = max(1, min(SWEEP_BATCH, LARGEST_LOGITS // a_window))
        return batches(ids, seq_len=self.seq_len, batch_size=rows, order=order)

    def cost(self) -> ModelCost | None:
        """FLOPs by part; None for a model whose blocks cannot be run one by one."""
        context = (min(self.seq_len, len(self.ids) - 1) + 1) / 2
        try:
            return model_cost(self.model, context=context, fitted=self.fitted)
        except UnsupportedArchitectureError:
            return None

    def about(self) -> dict[str, Any]:
        """What every result says of the text."""
        return {
            "num_layers": self.model.num_layers,
            "exit_layers": list(self.model.exit_layers),
            "n_tokens": len(self.ids) - 1,
            "unknown_tokens": self.unknown_tokens,
            "missing_kv": "recompute",
            "seen_in_training": self.seen_in_training,
            "corpus": {
                "name": self.corpus.name,
                "sha256": self.corpus.sha256,
                "read": self.read,
            },
        }


def open_reading(
    folder: Path,
    corpus_name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Reading:
    """Load any model that ``load_model`` takes, with its gates, and a text.

    The text is the corpus's test split if it has a named one, else the whole corpus.
    """
    if (folder / UNFINISHED).exists() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: expected a model, but the run there is unfinished and has not validated "
            f"yet; go on with it by offramp train --resume {folder}"
        )
    model, tokenizer = load_model(folder, device=device, dtype=dtype)
    untrained = not model.exits.trained
    model.exits.warned = True  # it is in the result
    corpus = load_corpus(corpus_name)
    ids = encode(tokenizer, corpus.whole if corpus.test is None else corpus.test)
    if len(ids) < 2:
        raise CorpusError(f"{corpus_name}: expected at least 2 tokens, got {len(ids)}")
    return Reading(
        folder=folder,
        model=model,
        fitted=load_fitted(folder, device=device),
        seq_len=window_length(folder, model),
        corpus=corpus,
        ids=ids,
        read="whole" if corpus.test is None else "test split",
        unknown_tokens=count_unknown(tokenizer, ids),
        untrained=untrained,
        seen_in_training=corpus.test is None and corpus.sha256 in trained_on(folder),
    )


def trained_on(folder: Path) -> set[str]:
    """sha256 of the corpora that the model, or its exits, were trained on, where it says so."""
    found: set[str] = set()
    for name, key in (
        ("config.json", "corpus"),
        ("config.json", "specialised"),
        (EXITS_JSON, "trained"),
    ):
        stored = read_json(folder / name) if (folder / name).is_file() else None
        part = stored.get(key) if isinstance(stored, dict) else None
        if isinstance(part, dict):
            corpus = part if key == "corpus" else part.get("corpus")
            sha256 = corpus.get("sha256") if isinstance(corpus, dict) else None
            found |= {value for value in (sha256, part.get("corpus_sha256")) if value}
    return found
