"""The logits of tokens at several exits, whose LM head is read once if it is the same."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from offramp.models.exit_heads import ExitHead
from offramp.models.native.fast import kernels
from offramp.models.native.fast.products import Weight
from offramp.models.native.fast.steps import FastSteps

AtExit = tuple[Float[Tensor, "_ 1 D"], nn.Module, Weight]
"""States at an exit, and its norm (or own head) and the weight of its LM head."""


def logits_at(steps: FastSteps, parts: Sequence[AtExit]) -> list[Float[Tensor, "_ 1 V"]]:
    """Return the logits at each exit. A token's logits do not depend on the other tokens."""
    weight = parts[0][2]
    if len(parts) == 1 or not all(_shares(steps, part, weight) for part in parts):
        return [steps.logits(*part, None) for part in parts]
    inputs = [steps.head_input(h[:, 0], norm, weight) for h, norm, _ in parts]
    logits = kernels.linear(torch.cat(inputs), weight).to(parts[0][0].dtype)
    return list(logits[:, None].split([len(each) for each in inputs]))


def _shares(steps: FastSteps, part: AtExit, weight: Weight) -> bool:
    """Return whether the kernels read this weight for the exit, behind an adapter."""
    _, head, own = part
    adapted = isinstance(head, ExitHead) and head.adapter is not None
    return adapted and own is weight and kernels.kernels_fit(weight, steps.head_dim)
