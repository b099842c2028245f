"""Read the batches of the trainers of ``transformers``: padding, labels of -100, packed texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from offramp.errors import ConfigError

IGNORED = -100
"""The label of a token that is not predicted, in ``transformers``."""
_READ = {"input_ids", "labels", "attention_mask", "position_ids"}
_WITHOUT_EFFECT = {
    *("use_cache", "return_loss", "num_items_in_batch", "output_router_logits", "seq_idx"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}
"""Inputs that say nothing of the tokens, or nothing more than the positions do."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Texts without padding before or between their tokens, and the token that follows each."""

    inputs: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    kept: Bool[Tensor, "B T"] | None
    "True at the targets that count; None if all do."
    count: int
    "Number of targets that count."


def read_batch(given: Mapping[str, Any]) -> Batch:
    """Return the texts of a batch, each in a row of its own.

    The last token of a text is only a target. Texts that are packed into one row, whose
    ``position_ids`` begin again at 0, become several rows, so that none attends to another. Raises
    ConfigError for an input that is not understood.
    """
    unknown = sorted(name for name, value in given.items() if value is not None)
    unknown = [name for name in unknown if name not in _READ | _WITHOUT_EFFECT]
    if unknown:
        raise ConfigError(
            f"{unknown[0]}: expected a batch of {', '.join(sorted(_READ))}, got {unknown[0]}, too"
        )
    ids = _matrix(given, "input_ids")
    labels = _matrix(given, "labels", ids.shape)
    real = None
    if given.get("attention_mask") is not None:
        real = _matrix(given, "attention_mask", ids.shape) != 0
    text = None
    if given.get("position_ids") is not None:
        text = _texts(_matrix(given, "position_ids", ids.shape), real)
    if text is not None and (text > 0).any():
        ids, labels = _apart(ids, labels, text)
    elif real is not None:
        if bool((real[:, 1:] > real[:, :-1]).any()):
            ids, labels = _apart(ids, labels, torch.where(real, 0, -1))
        else:  # only after the text
            labels = labels.masked_fill(~real, IGNORED)
    if ids.shape[1] < 2:
        short = (0, 2 - ids.shape[1])
        ids, labels = F.pad(ids, short), F.pad(labels, short, value=IGNORED)
    targets = labels[:, 1:]
    kept = targets != IGNORED
    count = int(kept.sum())
    everything = count == kept.numel()
    return Batch(
        inputs=ids[:, :-1], targets=targets, kept=None if everything else kept, count=count
    )


def counted_labels(given: Mapping[str, Any]) -> Tensor:
    """Return labels for a trainer that counts those other than -100, the first ones or not."""
    targets = read_batch(given).targets
    first = targets.new_full((len(targets), 1), IGNORED)
    return torch.cat((first, targets), dim=1)


def _matrix(given: Mapping[str, Any], name: str, shape: torch.Size | None = None) -> Tensor:
    """Return an input (rows, tokens) of this shape. Raises ConfigError for anything else."""
    value = given.get(name)
    if not isinstance(value, Tensor) or value.ndim != 2:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        hint = "; DataCollatorForLanguageModeling(tokenizer, mlm=False) makes them"
        raise ConfigError(
            f"{name}: expected a tensor (rows, tokens), got {got}{hint if name == 'labels' else ''}"
        )
    if shape is not None and name == "position_ids" and len(value) == 1:
        value = value.expand(shape[0], -1)
    if shape is not None and value.shape != shape:
        raise ConfigError(
            f"{name}: expected the shape {tuple(shape)} of input_ids, got {tuple(value.shape)}"
        )
    return value


def _texts(positions: Tensor, real: Tensor | None) -> Tensor:
    """Return the number of the text of each token in its row, from 0, and -1 at padding.

    Raises ConfigError unless the positions count 0, 1, 2, ... in each text.
    """
    real = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    begins = real & (positions == 0)
    before = F.pad(real, (1, 0))[:, :-1]
    follows = before & (positions == F.pad(positions, (1, 0))[:, :-1] + 1)
    if bool((real & ~begins & ~follows).any()):
        raise ConfigError(
            "position_ids: expected 0, 1, 2, ... in each text of a row, got other positions"
        )
    return torch.where(real, begins.long().cumsum(dim=1) - 1, -1)


def _apart(ids: Tensor, labels: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the texts, each in a row of its own, with padding only behind them."""
    chosen = [
        (row, text[row] == number)
        for row in range(len(ids))
        for number in range(max(1, int(text[row].max()) + 1))
    ]
    return (
        pad_sequence([ids[row, where] for row, where in chosen], batch_first=True),
        pad_sequence(
            [labels[row, where] for row, where in chosen],
            batch_first=True,
            padding_value=float(IGNORED),
        ),
    )
