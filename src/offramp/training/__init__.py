"""Training a native decoder with any objective; runs that survive being killed."""

from offramp.training.checkpoint import Checkpoints
from offramp.training.config import TrainConfig, learning_rate_factor
from offramp.training.exit_loss import ExitLoss
from offramp.training.loop import (
    Progress,
    TrainResult,
    Validation,
    new_model,
    train,
    validate,
)

__all__ = [
    "Checkpoints",
    "ExitLoss",
    "Progress",
    "TrainConfig",
    "TrainResult",
    "Validation",
    "learning_rate_factor",
    "new_model",
    "train",
    "validate",
]
