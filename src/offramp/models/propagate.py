"""Run whole sequences under ``missing_kv="propagate"``, with all tokens in parallel.

A token that left keeps its state, and in the layers above later tokens attend to keys and values
computed from it. Evaluation and generation both use this definition.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from offramp.models.base import EarlyExitModel, Step

Leaves = Callable[[int, Float[Tensor, "B T D"], Float[Tensor, "B T D"]], Bool[Tensor, "B T"]]
"""(exit layer, state there, state one block before) -> which tokens would leave there."""


def run_propagated(
    model: EarlyExitModel,
    input_ids: Int[Tensor, "B T"],
    leaves: Leaves,
    *,
    step: Step,
    needs_previous_state: bool = False,
) -> tuple[Float[Tensor, "B T D"], Int[Tensor, "B T"]]:
    """Return each token's state at the exit where it left, and the layer of that exit.

    ``leaves`` is called at every exit but the last, for all tokens; its result counts for those
    that have not left yet. It gets the state one block before the exit if
    ``needs_previous_state``, else the state at the exit twice.
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
