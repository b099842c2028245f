"""The vocabulary of a tokenizer: its size, and its unknown token."""

import json

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, models
from torch import Tensor

from offramp.errors import CorpusError

MOST_UNUSED = 1 << 20
"""Largest number of ids below a tokenizer's largest one that have no token."""


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the size that a vocabulary needs: the largest id + 1, as some ids may be unused.

    A tokenizer whose tokens were pruned or moved has fewer tokens than that. Raises CorpusError
    for an id so large that a model for it would consist of unused embeddings.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    size = max(ids, default=-1) + 1
    if size > len(ids) + MOST_UNUSED:
        raise CorpusError(
            f"tokenizer: expected at most {MOST_UNUSED:,} ids without a token, got {len(ids):,} "
            f"tokens with ids up to {size - 1}"
        )
    return size


def count_unknown(tokenizer: Tokenizer, ids: Int[Tensor, " N"]) -> int:
    """Return how many ids are the tokenizer's unknown token; 0 if it has none."""
    unknown = unknown_id(tokenizer)
    return 0 if unknown is None else int(torch.eq(ids, unknown).sum())


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of the unknown token; None if there is none."""
    if isinstance(tokenizer.model, models.Unigram):  # has no attribute for it
        stored = json.loads(tokenizer.to_str())["model"]["unk_id"]
        return None if stored is None else int(stored)
    token = tokenizer.model.unk_token
    return tokenizer.token_to_id(token) if token else None
