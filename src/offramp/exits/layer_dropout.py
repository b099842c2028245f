"""Layer dropout (LayerSkip, Elhoushi et al. 2024, section 4.1.1): samples skip whole blocks.

A sample that skips a block keeps its state, which is not rescaled. Evaluation runs all blocks.
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
    """Return the share of samples that skip each layer, 1..L, at a step, counted from 1.

    p = S(t) (exp(l ln 2 / (L - 1)) - 1) p_max, with l from 0: the first layer is never skipped,
    and the last one most often. S is 1, or exp(t ln 2 / (T - 1)) - 1 with t from 0 to T - 1.
    """
    scale = config.layer_dropout
    if config.layer_dropout_schedule == "exponential":
        scale *= _doubling(step - 1, total_steps)
    return tuple(scale * _doubling(below, num_layers) for below in range(num_layers))


def keep_mask(
    rates: tuple[float, ...], layer: int, *, seed: int, step: int, rows: slice, batch_size: int
) -> Bool[Tensor, " rows"]:
    """Return a mask, on the CPU, of the ``rows`` of the global batch that run this layer (from 1).

    The draws depend only on (seed, step, layer), so they are the same for any number of processes
    and after a resume.
    """
    assert 1 <= layer <= len(rates)
    assert (rows.stop or 0) <= batch_size
    draws = np.random.default_rng((seed, step, layer)).random(batch_size)
    return torch.from_numpy(draws[rows] >= rates[layer - 1])


def _doubling(index: int, count: int) -> float:
    """Return exp(index ln 2 / (count - 1)) - 1, which goes from 0 to 1 over ``count`` indices."""
    return math.expm1(index * math.log(2) / (count - 1)) if count > 1 else 0.0
