"""What an exit's loss may do to the trunk: gradients where the state branches to an exit.

A branch takes the state at branch i of k and gives the state that the exit sees and the one that
the trunk goes on with; both hold the same numbers, only their gradients differ. Branches are
counted from 1 over the layers that have a weight at this step and the last layer, which is
branch k whether it has a weight or not.
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
    """The branch that the config names."""
    if config.gradient_equilibrium:
        return equilibrium
    return detached if config.detach_exits else plain


def plain(h: State, i: int, k: int) -> tuple[State, State]:
    """Every loss sends its whole gradient down."""
    return h, h


def detached(h: State, i: int, k: int) -> tuple[State, State]:
    """Early exits train what they have of their own; only the last layer's loss goes down."""
    return (h if i == k else h.detach()), h


def equilibrium(h: State, i: int, k: int) -> tuple[State, State]:
    """Gradient equilibrium (Li et al. 2019, "Improved Techniques for Training Adaptive Deep
    Networks", section 3.1): the trunk below branch i gets the mean of the k - i + 1 losses above.

    The exit sends 1 / (k - i + 1) of its gradient, what comes from deeper branches counts
    (k - i) / (k - i + 1). Heads keep their gradient whole.
    """
    losses = k - i + 1
    return _scale_gradient(h, 1 / losses), _scale_gradient(h, (k - i) / losses)


def _scale_gradient(h: State, factor: float) -> State:
    if factor == 1:
        return h
    scaled: Tensor = _ScaleGradient.apply(h, factor)  # type: ignore[no-untyped-call]
    return scaled


class _ScaleGradient(torch.autograd.Function):
    """The same numbers; factor times the gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
