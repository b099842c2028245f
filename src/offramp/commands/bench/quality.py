"""PPL of each way to decode, which stands beside its speed: of a text that is given, not generated.

A threshold is applied to each token of the windows, as in ``offramp sweep``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from offramp.evaluation.routed import collect_routed
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import collect_trace, perplexity
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.exits.policy import ThresholdPolicy
from offramp.models.base import EarlyExitModel

Windows = Sequence[tuple[Int[Tensor, "B S"], Int[Tensor, "B T"]]]
"""Inputs, and the targets of the last T of them."""


def routed_ppl(
    model: EarlyExitModel,
    windows: Windows,
    *,
    threshold: float = math.inf,
    confidence: str = "max_prob",
    missing_kv: str = "propagate",
    fitted: FittedExits = NOTHING_FITTED,
) -> float:
    """Return the PPL at a threshold; that of full depth at ``inf``, where no exit is evaluated."""
    if missing_kv == "recompute" and math.isfinite(threshold):
        trace = collect_trace(model, iter(windows), measures=(confidence,), fitted=fitted)
        return sweep(trace, [threshold], confidence=confidence)[0].ppl
    policy = ThresholdPolicy.of(threshold, len(model.exit_layers))
    total, count = 0.0, 0
    for inputs, targets in windows:
        every = torch.cat((inputs[:, 1:], targets[:, -1:]), dim=1)
        routed = collect_routed(
            model, [(inputs, every)], policy, confidence=confidence, fitted=fitted
        )
        losses = routed.nll.reshape(every.shape)[:, -targets.shape[1] :]
        total, count = total + float(losses.sum(dtype=float)), count + losses.size
    return perplexity(total / count)


@torch.inference_mode()
def transformers_ppl(lm: Any, windows: Windows) -> float:
    """Return the PPL of a causal language model of transformers."""
    total, count = 0.0, 0
    for inputs, targets in windows:
        targets = targets.to(lm.device)
        logits = lm(inputs.to(lm.device), use_cache=False).logits[:, -targets.shape[1] :]
        for row, wanted in zip(logits, targets, strict=True):
            total += F.cross_entropy(row.float(), wanted, reduction="sum").item()
        count += targets.numel()
    return perplexity(total / count)
