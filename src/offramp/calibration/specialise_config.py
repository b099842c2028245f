"""The options of specialising exits. Imports no PyTorch."""

import math
from dataclasses import dataclass, fields
from typing import get_args

from offramp.errors import ConfigError
from offramp.models.missing_kv import MissingKV


@dataclass(frozen=True, kw_only=True)
class SpecialiseConfig:
    """Options for training each exit on the tokens that leave there."""

    compute_budget: float = 60.0
    """Mean FLOPs per token, in percent of this model's own at full depth, that decides which
    tokens leave where."""
    tokens: int = 524_288
    "Number of tokens of the training text to learn from, drawn at random."
    steps: int = 3000
    "Number of AdamW steps for each exit."
    batch_size: int = 1024
    "Number of tokens per step."
    lr: float = 4e-3
    "Peak learning rate, which decays to zero along a cosine."
    weight_decay: float = 0.01
    "AdamW's weight decay."
    others: float = 0.05
    "Weight of tokens that do not exit here; those that do have weight 1."
    imitate: float = 1.0
    """Share of KL(p_L || p_e) in the loss; the rest is cross-entropy. (The model has memorised
    much of a text that it was trained on for several epochs; the last layer is then a better
    teacher than the text.)"""
    seed: int = 0
    "Seed of the gates and of the order of the tokens."
    add_exits: tuple[int, ...] = ()
    """Layers of exits to add. If there are any, all early exits first learn from all tokens, since
    no token would leave at an exit that predicts nothing yet."""
    first_steps: int = 2000
    "Number of AdamW steps for each exit on all tokens; only with ``add_exits``."
    missing_kv: MissingKV = "recompute"
    """Whether a token that leaves also costs its keys and values above the exit (propagate), as in
    decoding. Exits that are complete cost the same under both."""

    def __post_init__(self) -> None:
        meanings = get_args(MissingKV)
        if self.missing_kv not in meanings:
            raise ConfigError(
                f"missing_kv: expected {' or '.join(meanings)}, got {self.missing_kv!r}"
            )
        for field in fields(self):
            if field.type is float:  # 60 is 60.0, in a run's hash too
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        layers = tuple(sorted(set(self.add_exits)))
        if layers and layers[0] < 1:
            raise ConfigError(f"add_exits: expected layers of at least 1, got {layers[0]}")
        object.__setattr__(self, "add_exits", layers)
        for name in ("tokens", "steps", "batch_size", "first_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, least, most in (
            ("compute_budget", 0.0, 100.0),
            ("others", 0.0, 1.0),
            ("imitate", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"{name}: expected from {least:g} to {most:g}, got {value}")
        for name in ("lr", "weight_decay", "seed"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: expected a finite number of at least 0, got {value}")
