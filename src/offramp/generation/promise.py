"""Whether drafts and batches give the text of one token after another; see docs/decoding.md."""

import torch

from offramp.models.base import EarlyExitModel

_FINE = (torch.float32, torch.float64)
"""Precisions in which another order of sums changes a choice only between equally likely tokens."""


def drafts_keep_the_text(model: EarlyExitModel) -> bool:
    """Return whether speculative decoding gives the text of decoding without drafts.

    It is so in float32 and float64, and wherever a token's numbers do not depend on the tokens
    that are computed with it.
    """
    return model.dtype in _FINE or model.rounds_alike()


def batches_keep_the_text(model: EarlyExitModel) -> bool:
    """Return whether a row of a batch of up to FEW_TOKENS rows gives the text of its prompt alone.

    Prompts run one by one, and a step computes a token of each row, so it is as with drafts.
    """
    return drafts_keep_the_text(model)


def drafts_note(model: EarlyExitModel) -> str:
    """Return the sentence that says why drafts may change the text; empty if they do not."""
    if drafts_keep_the_text(model):
        return ""
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"In {dtype}, this model computes several tokens at once with other rounding than one, so "
        "the text may differ from that without drafts; --dtype float32 avoids this."
    )
