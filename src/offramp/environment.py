"""The environment that a figure was measured in."""

import platform
from typing import Any

import torch


def environment(device: str) -> dict[str, Any]:
    """What a figure may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
    }
