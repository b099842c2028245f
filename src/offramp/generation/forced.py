"""Route the tokens of a given text, as decoding routes those that it chooses."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from offramp.generation.confident_exit import ExitDecoder
from offramp.generation.exit_rule import ExitRule
from offramp.models.base import EarlyExitModel
from offramp.models.missing_kv import MissingKV


def forced_exits(
    model: EarlyExitModel,
    input_ids: Int[Tensor, "B T"],
    rule: ExitRule | None,
    *,
    missing_kv: MissingKV = "propagate",
) -> tuple[Float[Tensor, "B T V"], Int[Tensor, "B T"]]:
    """Route the tokens of a given text, one by one, instead of tokens that the model chooses.

    Returns the logits at the exit where each token left, and its exit layer. An evaluation of the
    same text must give the same results.
    """
    batch, length = input_ids.shape
    cache = model.make_cache(batch, length)
    decoder = ExitDecoder(model, cache, batch_size=batch, rule=rule, missing_kv=missing_kv)
    steps = [decoder.decode_one_token(ids, range(batch)) for ids in input_ids.T.tolist()]
    logits = torch.stack([exits.logits for exits in steps], dim=1)
    return logits, torch.tensor([exits.exit_layers for exits in steps]).T
