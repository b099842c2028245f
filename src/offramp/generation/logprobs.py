"""Log probabilities of a chosen token and of the likeliest ones, for requests that ask for them."""

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.generation.transfer import read

LogProbability = tuple[int, float]
"""A token id, and the logarithm of its probability."""


@torch.inference_mode()
def logprobs_of(
    logits: Float[Tensor, " V"], token: int, top: int
) -> tuple[float, tuple[LogProbability, ...]]:
    """Return the log probability of a token, and the ``top`` likeliest tokens with theirs.

    The probabilities are the softmax of the logits, without temperature, top-k, top-p or penalty.
    """
    found = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    best = found.topk(min(top, len(found)))
    ids = torch.cat([torch.tensor([token], device=found.device), best.indices])
    [own, *values], [_, *likeliest] = read(found[ids], ids)
    return own, tuple((int(id), value) for id, value in zip(likeliest, values, strict=True))
