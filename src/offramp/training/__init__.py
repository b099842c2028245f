"""Training a native decoder with any objective, in one process or many; runs that survive being
killed.
"""

from offramp.training.checkpoint import Checkpoints
from offramp.training.config import TrainConfig, learning_rate_factor
from offramp.training.distributed import (
    Processes,
    check_processes,
    join,
    local_device,
    whole_model,
)
from offramp.training.exit_loss import ExitLoss
from offramp.training.loop import (
    Progress,
    TrainResult,
    Validation,
    new_model,
    train,
    validate,
)
from offramp.training.tracking import RunLog, TrackerName, check_tracker

__all__ = [
    "Checkpoints",
    "ExitLoss",
    "Processes",
    "Progress",
    "RunLog",
    "TrackerName",
    "TrainConfig",
    "TrainResult",
    "Validation",
    "check_processes",
    "check_tracker",
    "join",
    "learning_rate_factor",
    "local_device",
    "new_model",
    "train",
    "validate",
    "whole_model",
]
