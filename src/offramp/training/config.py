"""The options of a training run, except for the model and the corpus."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from offramp.errors import ConfigError
from offramp.exits.objective import ObjectiveConfig

Schedule = Literal["constant", "cosine"]
Precision = Literal["float32", "bfloat16"]
Sharding = Literal["ddp", "fsdp"]
TrackerName = Literal["tensorboard", "wandb", "none"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ObjectiveConfig):
    """Options of a training run. Steps are optimizer updates; epochs are passes over the text."""

    steps: int | None = None
    "Number of steps, instead of --epochs."
    epochs: int | None = None
    "Number of passes over the training text (default: 1, if --steps is not given)."
    seq_len: int = 128
    "Number of tokens per window."
    batch_size: int = 32
    "Number of windows per step."
    lr: float = 1e-3
    "Peak learning rate of AdamW."
    weight_decay: float = 0.01
    "AdamW's weight decay."
    warmup_steps: int = 0
    "Number of steps of linear warm-up."
    schedule: Schedule = "constant"
    "Learning rate after the warm-up: constant, or cosine to zero."
    grad_clip: float = 1.0
    "Largest norm of the gradient; a larger gradient is scaled down."
    eval_every: int | None = None
    "Number of steps between validations (default: validate after each epoch and at the end)."
    patience: int | None = None
    "Stop after more than this many validations in a row without a new best (default: never)."
    select_at: float | None = None
    "Validate by the PPL routed at this threshold (default: by the weighted loss)."
    shuffle: bool = True
    "Read the windows in a new random order each epoch."
    seed: int = 0
    "Seed of the parameters, the order of the windows and layer dropout."
    precision: Precision = "float32"
    "float32, or bfloat16 for autocast (parameters stay float32)."
    accumulate: int = 1
    "Number of parts in which a batch is computed, one after another; must divide --batch-size."
    recompute_activations: bool = False
    "Compute each layer's activations again in the backward pass, to save memory."
    compile: bool = False
    "Compile the blocks with torch.compile; this saves time in long runs of larger models."
    sharding: Sharding = "ddp"
    "With several processes, each holds the whole model (ddp) or a part of it (fsdp)."
    checkpoint_every: int | None = None
    "Number of steps between checkpoints to resume from (default: one at each validation)."
    keep_checkpoints: int = 2
    "Number of the latest checkpoints to keep."

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("steps", "epochs", "seq_len", "batch_size", "eval_every", "accumulate")
        for name in (*counts, "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a number above 0, got {value}")
        for name in ("warmup_steps", "weight_decay", "patience", "seed"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: expected at least 0, got {value}")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"steps: expected steps or epochs, got both, {self.steps} and {self.epochs}"
            )
        if self.seed >= 2**63:
            raise ConfigError(f"seed: expected less than 2^63, got {self.seed}")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate: expected a divisor of batch_size {self.batch_size}, "
                f"got {self.accumulate}"
            )
        if self.precision not in get_args(Precision):
            raise ConfigError(f"precision: expected float32 or bfloat16, got {self.precision!r}")
        if self.sharding not in get_args(Sharding):
            raise ConfigError(f"sharding: expected ddp or fsdp, got {self.sharding!r}")
        if self.schedule not in get_args(Schedule):
            raise ConfigError(f"schedule: expected constant or cosine, got {self.schedule!r}")
        if self.select_at is not None and math.isnan(self.select_at):
            raise ConfigError("select_at: expected a number, got nan")

    def total_steps(self, steps_an_epoch: int) -> int:
        """Return the number of steps of the run; a pass over the text has ``steps_an_epoch``."""
        return self.steps or (self.epochs or 1) * steps_an_epoch


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the share of the peak learning rate at a step (from 1): warm-up, then schedule."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
