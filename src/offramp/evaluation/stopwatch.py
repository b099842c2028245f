"""Seconds of a call, without gradients, as in decoding: with them a model computes differently."""

import time
from collections.abc import Callable
from statistics import median

import torch


def seconds_of(
    part: Callable[[], object], rounds: int, *, before: Callable[[], object] | None = None
) -> float:
    """Return the median seconds of ``rounds`` rounds, after one round that does not count.

    ``before`` is called before each round, and is not timed.
    """
    found = []
    for _ in range(rounds + 1):
        if before:
            _once(before)
        found.append(_once(part))
    return median(found[1:])


def added_seconds(less: Callable[[], object], more: Callable[[], object], *, rounds: int) -> float:
    """Return how many seconds ``more`` takes in addition: the median of ``rounds`` rounds of both.

    The first of them does not count.
    """
    found = []
    for _ in range(rounds + 1):
        shorter = _once(less)
        found.append(_once(more) - shorter)
    return median(found[1:])


@torch.inference_mode()
def _once(part: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    _wait()
    start = time.perf_counter()
    part()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """Wait until the GPU has finished; it runs in the background."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
