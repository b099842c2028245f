"""The optimizer: AdamW with a learning rate for each layer."""

import re
from collections import defaultdict

import torch
from torch import Tensor, nn

from offramp.exits.objective import layer_lr_factors
from offramp.training.config import TrainConfig, learning_rate_factor


def make_optimizer(model: nn.Module, config: TrainConfig, *, num_layers: int) -> torch.optim.AdamW:
    """AdamW over all parameters, one group for each learning-rate factor (``layer_lr``)."""
    factors = layer_lr_factors(config, num_layers)
    groups: dict[float, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_factor(name, factors)].append(parameter)
    device = next(model.parameters()).device
    return torch.optim.AdamW(
        [{"params": parameters, "factor": factor} for factor, parameters in groups.items()],
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: TrainConfig
) -> float:
    """Give every group its rate at a step, counted from 1; what it is but for its factor."""
    rate = config.lr * learning_rate_factor(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate


def _factor(name: str, factors: dict[int, float]) -> float:
    if name.startswith("model.embed_tokens."):
        return factors[0]
    block = re.match(r"model\.layers\.(\d+)\.", name)
    return factors[int(block[1]) + 1] if block else 1.0
