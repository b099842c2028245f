"""Whole sequences under ``missing_kv="propagate"``: tokens stay parallel within a threshold.

A token that left keeps its state, and in the layers above later tokens see the keys and values
made from it. Evaluation and generation share this meaning.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from offramp.models.base import EarlyExitModel, Step

Leaves = Callable[[int, Float[Tensor, "B T D"], Float[Tensor, "B T D"]], Bool[Tensor, "B T"]]
"""(exit layer, state there, state a block before) -> who would leave there."""


def run_propagated(
    model: EarlyExitModel,
    input_ids: Int[Tensor, "B T"],
    leaves: Leaves,
    *,
    step: Step,
    needs_previous_state: bool = False,
) -> tuple[Float[Tensor, "B T D"], Int[Tensor, "B T"]]:
    """Each token's state at the exit where it left, and that exit's layer.

    ``leaves`` is asked at every exit but the last, of all tokens; its answer counts for those
    that are still there. The state a block before is the exit's own unless it is needed.
    """
    h = model.embed(input_ids, step=step)
    active = torch.ones_like(input_ids, dtype=torch.bool)
    exit_layers = torch.full_like(input_ids, model.num_layers)
    done = 0
    for layer in model.exit_layers:
        last = layer == model.num_layers
        cut = layer - 1 if needs_previous_state and not last else done
        previous = model.run_layers(h, done, cut, step=step, active=active) if cut > done else h
        h = model.run_layers(previous, cut, layer, step=step, active=active)
        done = layer
        if not last:
            here = active & leaves(layer, h, previous if needs_previous_state else h)
            exit_layers = exit_layers.masked_fill(here, layer)
            active = active & ~here
    return h, exit_layers
