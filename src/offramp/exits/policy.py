"""Policies: where each token leaves, given its confidence at every exit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ThresholdPolicy:
    """A token leaves at the first exit whose confidence is at least that exit's threshold.

    ``thresholds`` holds one number for each exit but the last, where all that are left leave.
    ``inf`` never lets a token leave, ``-inf`` always.
    """

    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        for threshold in self.thresholds:
            if math.isnan(threshold):
                raise ConfigError("threshold: expected a number, got nan")

    @classmethod
    def of(cls, threshold: float | Sequence[float], num_exits: int) -> "ThresholdPolicy":
        """One threshold for all ``num_exits`` exits, or one for each but the last."""
        early = num_exits - 1
        if isinstance(threshold, Sequence):
            if len(threshold) != early:
                raise ConfigError(
                    f"thresholds: expected {early}, one for each exit but the last, "
                    f"got {len(threshold)}"
                )
            return cls(thresholds=tuple(float(value) for value in threshold))
        return cls(thresholds=(float(threshold),) * early)

    def leaving(self, confidence: NDArray[np.float32]) -> NDArray[np.bool_]:
        """(exits, tokens), True where a token leaves; ``confidence`` is (exits - 1, tokens)."""
        here = np.empty((len(self.thresholds) + 1, confidence.shape[1]), dtype=np.bool_)
        staying = np.ones(confidence.shape[1], dtype=np.bool_)
        for index, threshold in enumerate(self.thresholds):
            at_least = confidence[index] >= _in_precision(threshold, confidence.dtype)
            np.logical_and(at_least, staying, out=here[index])
            staying &= ~at_least
        here[-1] = staying
        return here

    def route(self, confidence: NDArray[np.float32]) -> NDArray[np.intp]:
        """Index into the exits for each token; ``confidence`` is (exits - 1, tokens)."""
        taken: NDArray[np.intp] = self.leaving(confidence).argmax(axis=0)
        return taken


def _in_precision(threshold: float, dtype: np.dtype[np.float32]) -> np.float32:
    """The threshold in the scores' own precision.

    So a score equal to the threshold as written leaves, here and in a router that compares
    tensors. A threshold above 1 stays above it: no probability reaches it.
    """
    with np.errstate(over="ignore"):  # beyond the largest float32: infinite
        rounded: np.float32 = dtype.type(threshold)
    if threshold > 1.0 >= rounded:
        rounded = np.nextafter(rounded, dtype.type(np.inf))
    return rounded
