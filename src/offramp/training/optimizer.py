"""The optimizer: AdamW with a learning rate for each layer."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from offramp.exits.objective import ObjectiveConfig, layer_lr_factors
from offramp.models.base import TrainableModel
from offramp.training.config import TrainConfig, learning_rate_factor


def make_optimizer(model: TrainableModel, config: TrainConfig) -> torch.optim.AdamW:
    """Make AdamW over all trainable parameters, one group for each factor of ``layer_lr``."""
    factors = layer_lr_factors(config, model.num_layers)
    layers = model.layers_of_parameters() if config.layer_lr else {}
    groups: dict[float, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[factors.get(layers.get(name, -1), 1.0)].append(parameter)
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
    """Set the rate of every group at a step, counted from 1; return the rate without factors."""
    rate = config.lr * learning_rate_factor(step, total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate


def split_by_layer(
    optimizer: torch.optim.Optimizer, model: TrainableModel, config: ObjectiveConfig
) -> None:
    """Split the groups of a new optimizer by the factors of ``layer_lr``, and apply these."""
    factors = layer_lr_factors(config, model.num_layers)
    layers = model.layers_of_parameters()
    factor_of = {
        id(parameter): factors.get(layers[name], 1.0)
        for name, parameter in model.named_parameters()
    }
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_factor: dict[float, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            by_factor[factor_of.get(id(parameter), 1.0)].append(parameter)
        groups += [
            {**group, "params": parameters, "lr": group["lr"] * factor}
            for factor, parameters in by_factor.items()
        ]
    optimizer.param_groups[:] = groups
