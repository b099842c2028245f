"""The gradients that an exit's loss sends to the trunk, where the state branches to an exit.

A branch takes the state at branch i of k and returns the state for the exit and the state for
the trunk. Both have the same values; only their gradients differ. Branches are counted from 1
over the layers that have a weight at this step and the last layer, which is always branch k.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.exits.objective import ObjectiveConfig

State = Float[Tensor, "*B D"]
Branch = Callable[[State, int, int], tuple[State, State]]
"""(state, i, k) -> (state for the exit, state for the trunk)."""


def branch_of(config: ObjectiveConfig) -> Branch:
    """Return the branch function for a config."""
    if config.gradient_equilibrium:
        return equilibrium
    return detached if config.detach_exits else plain


def plain(h: State, i: int, k: int) -> tuple[State, State]:
    """Branch without a change: every loss sends its whole gradient to the trunk."""
    return h, h


def detached(h: State, i: int, k: int) -> tuple[State, State]:
    """Detach early exits: they train only their own parameters; the last loss trains the trunk."""
    return (h if i == k else h.detach()), h


def equilibrium(h: State, i: int, k: int) -> tuple[State, State]:
    """Scale gradients so that the trunk below branch i gets the mean of the k - i + 1 losses above.

    This is gradient equilibrium (Li et al. 2019, "Improved Techniques for Training Adaptive Deep
    Networks", section 3.1). The exit's gradient is multiplied by 1 / (k - i + 1), and the gradient
    from deeper branches by (k - i) / (k - i + 1). The gradients of the heads do not change.
    """
    losses = k - i + 1
    return _scale_gradient(h, 1 / losses), _scale_gradient(h, (k - i) / losses)


def _scale_gradient(h: State, factor: float) -> State:
    if factor == 1:
        return h
    scaled: Tensor = _ScaleGradient.apply(h, factor)  # type: ignore[no-untyped-call]
    return scaled


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose backward pass multiplies the gradient by a factor."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
