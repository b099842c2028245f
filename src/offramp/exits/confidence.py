"""Confidence: how sure an exit is, from its logits. Higher always means leave.

Each measure takes logits (..., V) and gives scores (...), float32, one for each token and
independent of the batch it sits in. New measures register here under the field's name.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Confidence = Callable[[Float[Tensor, "*B V"]], Float[Tensor, "*B"]]


def max_prob(logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    """The largest softmax probability, max_v p(v); in (0, 1]."""
    return torch.softmax(logits.float(), dim=-1).amax(dim=-1)


CONFIDENCE: dict[str, Confidence] = {"max_prob": max_prob}
"""Every measure by its name."""
