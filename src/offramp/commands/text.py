"""A text, encoded for an opened model: what ``sweep``, ``calibrate`` and others measure on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from offramp.data.corpus import Corpus, load_corpus
from offramp.data.tokenizer import encode
from offramp.data.vocabulary import count_unknown
from offramp.data.windows import batches
from offramp.errors import CheckpointError, CorpusError, UnsupportedArchitectureError
from offramp.evaluation.cost import ModelCost, model_cost
from offramp.evaluation.trace import ExitTrace, collect_trace
from offramp.models.missing_kv import missing_kv_of
from offramp.models.open import OpenedModel

OnTokens = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""
BATCH = 32
"""Windows of a batch at the most."""
LARGEST_LOGITS = 1 << 26
"""Logits of one exit in a batch at the most; 256 MB in float32."""


@dataclass(frozen=True, kw_only=True, repr=False)
class MeasuredText:
    """The ids of a text, with the model that reads it and the corpus that it comes from."""

    opened: OpenedModel
    corpus: Corpus
    ids: Int[Tensor, " N"]
    read: str
    "Which part of the corpus was encoded: whole, or test split."

    def __repr__(self) -> str:
        return f"MeasuredText({len(self.ids):,} tokens of {self.corpus.name!r}, {self.read})"

    @property
    def unknown_tokens(self) -> int:
        """Number of tokens that are the tokenizer's unknown token."""
        return count_unknown(self.opened.tokenizer, self.ids)

    @property
    def seen_in_training(self) -> bool:
        """Whether the model or its exits were trained on a part of this text."""
        return self.read == "whole" and self.corpus.sha256 in self.opened.record.corpora

    def first(self, tokens: int) -> "MeasuredText":
        """The same text cut after its first ``tokens`` predicted tokens."""
        return replace(self, ids=self.ids[: tokens + 1])

    def trace(
        self,
        measures: Sequence[str],
        *,
        kl: bool = False,
        on_tokens: OnTokens | None = None,
    ) -> ExitTrace:
        """Run the model once over the text; a CheckpointError if all losses are NaN."""
        done = 0

        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            if on_tokens:
                on_tokens(done, len(self.ids) - 1)

        trace = collect_trace(
            self.opened.model,
            windows(self.opened, self.ids),
            measures=measures,
            fitted=self.opened.fitted,
            kl=kl,
            on_tokens=count,
        )
        if not np.isfinite(trace.nll).any():
            raise CheckpointError(
                f"{self.opened.name}: expected finite losses, got none; are the weights NaN?"
            )
        return trace

    def cost(self) -> ModelCost | None:
        """FLOPs by part; None for a model whose blocks cannot be run one by one."""
        context = (min(self.opened.window, len(self.ids) - 1) + 1) / 2
        context += len(self.opened.first_tokens)
        try:
            return model_cost(self.opened.model, context=context, fitted=self.opened.fitted)
        except UnsupportedArchitectureError:
            return None

    def about(self) -> dict[str, Any]:
        """What every result file says of the model and the text."""
        model = self.opened.model
        return {
            "num_layers": model.num_layers,
            "exit_layers": list(model.exit_layers),
            "n_tokens": len(self.ids) - 1,
            "unknown_tokens": self.unknown_tokens,
            "missing_kv": missing_kv_of(model, "recompute"),
            "complete_from": model.complete_from,
            "seen_in_training": self.seen_in_training,
            "untrained": not self.opened.exits_trained,
            "unfinished": self.opened.unfinished,
            "bos": bool(self.opened.first_tokens),
            **({} if self.opened.weights is None else {"weights": self.opened.weights}),
            "temperatures": dict(self.opened.fitted.temperatures),
            "corpus": {
                "name": self.corpus.name,
                "sha256": self.corpus.sha256,
                "read": self.read,
            },
        }


def read_text(opened: OpenedModel, corpus: str) -> MeasuredText:
    """Encode a corpus: its test split if it has a named one, else the whole corpus.

    Raises CorpusError for a corpus that is missing, unreadable or has fewer than 2 tokens.
    """
    loaded = load_corpus(corpus)
    ids = encode(opened.tokenizer, loaded.whole if loaded.test is None else loaded.test)
    if len(ids) < 2:
        raise CorpusError(f"{corpus}: expected at least 2 tokens, got {len(ids)}")
    return MeasuredText(
        opened=opened,
        corpus=loaded,
        ids=ids,
        read="whole" if loaded.test is None else "test split",
    )


def training_ids(opened: OpenedModel, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Ids of a corpus's training text and of its validation text, (N,) each."""
    train, validation = (
        encode(opened.tokenizer, text) for text in (corpus.train, corpus.validation)
    )
    if len(train) < 2 or len(validation) < 2:
        raise CorpusError(f"{corpus.name}: expected at least 2 tokens to train and to validate")
    return train, validation


def windows(
    opened: OpenedModel, ids: Int[Tensor, " N"], order: torch.Generator | None = None
) -> Any:
    """Batches of windows of a text, of a size at which the logits of one exit fit the memory."""
    a_window = (opened.window + len(opened.first_tokens)) * opened.model.vocab_size
    rows = max(1, min(BATCH, LARGEST_LOGITS // a_window))
    return batches(
        ids, seq_len=opened.window, batch_size=rows, order=order, first=opened.first_tokens
    )
