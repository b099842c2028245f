"""The validations of a training run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from offramp.data import batches
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import collect_trace
from offramp.models.base import EarlyExitModel
from offramp.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One pass over the validation text."""

    step: int
    epoch: int
    score: float
    "The score that the run minimises: the routed PPL at select_at, or the weighted loss in nats."
    exit_ppl: dict[int, float]
    is_best: bool


def stale(validations: Sequence[Validation], config: TrainConfig) -> bool:
    """Return whether more than ``patience`` validations in a row brought no new best."""
    if config.patience is None or not validations:
        return False
    since_best = 0
    for validation in validations:
        since_best = 0 if validation.is_best else since_best + 1
    return since_best > config.patience


def validate(
    model: EarlyExitModel,
    validation_ids: Int[Tensor, " M"],
    weights: Mapping[int, float],
    config: TrainConfig,
    first_tokens: Sequence[int] = (),
) -> tuple[float, dict[int, float]]:
    """Return the score that the run minimises, and the PPL of every exit and weighted layer."""
    layers = sorted({*model.exit_layers, *weights})
    windows = batches(
        validation_ids,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        first=first_tokens,
    )
    trace = collect_trace(model, windows, layers=layers)
    exit_ppl = {layer: trace.ppl(layer) for layer in layers}
    if config.select_at is None:
        score = sum(weight * math.log(exit_ppl[layer]) for layer, weight in weights.items())
    else:
        score = sweep(trace.at(model.exit_layers), [config.select_at])[0].ppl
    return score, exit_ppl
