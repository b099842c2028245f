"""Run a part of the model again and again on the same tensors: as it is, or as a CUDA graph.

A graph holds the kernels of a part with the addresses that they read and write. To replay it costs
one launch instead of one for each kernel. So a part takes its inputs from tensors that stay where
they are, and must not read a number back from the device.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Part = Callable[[], Tensor | None]
"""A part of the model that reads and writes fixed tensors; the result is overwritten by the next
call."""


def captured(part: Part, *, pool: Any, device: torch.device) -> Part:
    """Return what runs a part as a CUDA graph. The part runs once before: this chooses its kernels.

    ``pool`` is the memory of graphs that never run at the same time. If PyTorch cannot capture the
    part, it is returned itself, and a warning says why.
    """
    with torch.cuda.device(device):
        return _captured(part, pool)


def _captured(part: Part, pool: Any) -> Part:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        part()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = part()
    except RuntimeError as error:
        warnings.warn(
            f"CUDA graph: this part of the model runs without one, more slowly: {error}",
            stacklevel=3,
        )
        return part

    def replay() -> Tensor | None:
        graph.replay()
        return out

    return replay


def new_pool() -> Any:
    """Return a new pool of memory for graphs; None without a GPU."""
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
