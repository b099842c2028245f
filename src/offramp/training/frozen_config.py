"""The options of training exits on a frozen backbone. Imports no PyTorch."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from offramp.errors import ConfigError

Objective = Literal["distill", "text", "both"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """Options for training exits on a frozen backbone."""

    objective: Objective = "distill"
    "Imitate the final layer (distill), predict the text (text), or both."
    distill_temperature: float = 0.7
    """Temperature of both distributions with the objective distill (Hinton et al. 2015). Below 1,
    likely tokens count more, and exits agree more often with the final layer's prediction."""
    epochs: int = 4
    "Number of passes over the kept states."
    seq_len: int = 256
    "Number of tokens per window of the backbone."
    batch_size: int = 256
    "Number of tokens per step."
    lr: float = 1e-3
    "Peak learning rate of AdamW, which decays to zero along a cosine."
    weight_decay: float = 0.01
    "AdamW's weight decay."
    warmup_steps: int = 30
    "Number of steps of linear warm-up."
    seed: int = 0
    "Seed of the exits' parameters and of the order of the tokens."
    precision: Precision = "auto"
    """Precision of the exits' matrix products: bfloat16 for autocast (parameters stay float32),
    float32, or auto, which is bfloat16 if the processor supports it and the model is float32. The
    backbone keeps its own precision."""

    def __post_init__(self) -> None:
        for name, choices in (("objective", Objective), ("precision", Precision)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"{name}: expected one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        for name, least in (
            ("epochs", 1),
            ("seq_len", 1),
            ("batch_size", 1),
            ("warmup_steps", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.distill_temperature < math.inf:
            raise ConfigError(
                f"distill_temperature: expected a positive number, got {self.distill_temperature}"
            )
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: expected a finite number of at least 0, got {value}")
