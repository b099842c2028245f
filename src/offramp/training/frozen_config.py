"""How to train exits on a frozen backbone. Imports no PyTorch."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from offramp.errors import ConfigError

Objective = Literal["distill", "text", "both"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """How to train exits on a frozen backbone."""

    objective: Objective = "distill"
    "Imitate the final layer (distill), predict the text (text), or both."
    distill_temperature: float = 0.7
    """Of both distributions when exits imitate alone (distill; Hinton et al. 2015): below 1 the
    final layer's first choices count for more, and exits agree with them more often."""
    epochs: int = 4
    "Passes over the kept states."
    seq_len: int = 256
    "Tokens a window of the backbone."
    batch_size: int = 256
    "Tokens a step."
    lr: float = 1e-3
    "Peak learning rate of AdamW; cosine to zero."
    weight_decay: float = 0.01
    "AdamW's weight decay."
    warmup_steps: int = 30
    "Steps of linear warm-up."
    seed: int = 0
    "Seed of the exits' parameters and of the order of the tokens."
    precision: Precision = "auto"
    """Of the exits' products: bfloat16 for autocast (parameters stay float32), float32, or
    bfloat16 where the processor has it and the model is float32 (auto). The backbone's are its
    own."""

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
