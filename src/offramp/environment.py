"""The environment that a figure was measured in."""

import platform
from typing import Any

import torch


def environment(device: str) -> dict[str, Any]:
    """Return versions, platform, device and thread count, on which a figure may depend."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
    }
