"""Move small values between Python and the device of a model, with as few waits as possible.

A GPU runs behind Python. Each value that is read from it waits until it has computed everything
before, so values that are needed together are read together. What is sent to it does not wait.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return a tensor of these whole numbers on a device."""
    return moved(torch.tensor(numbers, dtype=torch.long), device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device. To a GPU it goes through memory that is pinned."""
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def read(*tensors: Tensor) -> list[list[float]]:
    """Return the numbers of tensors (N,) of one device, read in one transfer.

    They pass through float64, which holds every number of the other types that decoding uses.
    """
    if tensors[0].device.type != "cuda":
        return [tensor.tolist() for tensor in tensors]
    found: list[list[float]] = torch.stack([tensor.double() for tensor in tensors]).tolist()
    return found
