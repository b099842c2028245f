"""The training loss: a weighted sum of the exits' cross-entropies."""

from collections.abc import Callable, Iterable, Mapping

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def exit_losses(
    states: Iterable[tuple[int, Float[Tensor, "B T D"]]],
    unembed: Callable[[Tensor, int], Tensor],
    targets: Int[Tensor, "B T"],
) -> dict[int, Float[Tensor, ""]]:
    """Mean cross-entropy, in nats a token, at each (layer, state)."""
    return {
        layer: F.cross_entropy(unembed(h, layer).flatten(0, 1), targets.flatten())
        for layer, h in states
    }


def weighted_sum(
    losses: Mapping[int, Float[Tensor, ""]], weights: Mapping[int, float]
) -> Float[Tensor, ""]:
    """Sum of weight x loss over the layers; each weight must have its loss."""
    total: Tensor = sum(weight * losses[layer] for layer, weight in weights.items())  # type: ignore[assignment]
    return total
