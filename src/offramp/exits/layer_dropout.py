"""Layer dropout (LayerSkip, Elhoushi et al. 2024, section 4.1.1): samples skip whole blocks.

A sample that skips a block keeps its state, which is not rescaled; evaluation skips nothing.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from offramp.exits.objective import ObjectiveConfig


def layer_dropout_rates(
    config: ObjectiveConfig, step: int, total_steps: int, num_layers: int
) -> tuple[float, ...]:
    """Share of samples that skip each layer, 1..L, at a step (from 1) of the whole run.

    p = S(t) (exp(l ln 2 / (L - 1)) - 1) p_max, l from 0: the first layer is never skipped, the
    last one most. S is 1, or exp(t ln 2 / (T - 1)) - 1 with t from 0 to T - 1.
    """
    scale = config.layer_dropout
    if config.layer_dropout_schedule == "exponential":
        scale *= _doubling(step - 1, total_steps)
    return tuple(scale * _doubling(below, num_layers) for below in range(num_layers))


def keep_mask(
    rates: tuple[float, ...], layer: int, *, seed: int, step: int, rows: slice, batch_size: int
) -> Bool[Tensor, " rows"]:
    """Which of ``rows`` of the global batch run this layer (from 1) at this step.

    The draws depend on (seed, step, layer) only, so they are the same for any number of processes
    and after a resume. On the CPU.
    """
    assert 1 <= layer <= len(rates)
    assert (rows.stop or 0) <= batch_size
    draws = np.random.default_rng((seed, step, layer)).random(batch_size)
    return torch.from_numpy(draws[rows] >= rates[layer - 1])


def _doubling(index: int, count: int) -> float:
    """exp(index ln 2 / (count - 1)) - 1: from 0 at the first of ``count`` to 1 at the last."""
    return math.expm1(index * math.log(2) / (count - 1)) if count > 1 else 0.0
