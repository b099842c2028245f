"""Policies decide at which exit each token leaves, from its confidence at the exits.

Each policy has ``leaving``, for arrays over all exits and tokens (a trace), and ``leaves``, for
tensors at one exit (a decoder). Both compare in the precision of the scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from offramp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Decay:
    """The decaying threshold of CALM (Schuster et al. 2022, section 3.4).

    At position t, counted from 0, of ``length`` N the threshold is
    clip(0.9 threshold + 0.1 exp(-tau t / N), 0, 1): early tokens, on which all later ones depend,
    need more confidence to leave. A threshold outside [0, 1], which no probability or every
    probability reaches, does not change.
    """

    tau: float
    length: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau >= 0):
            raise ConfigError(f"decay: expected a number of at least 0, got {self.tau}")
        if self.length < 1:
            raise ConfigError(f"length: expected at least 1, got {self.length}")

    def threshold(self, threshold: float, positions: NDArray[Any]) -> NDArray[np.float64]:
        """Return the threshold at each position."""
        if not 0 <= threshold <= 1:
            return np.full(positions.shape, threshold, dtype=np.float64)
        with np.errstate(over="ignore"):  # exp(-inf) is 0
            added = 0.1 * np.exp(-self.tau * np.asarray(positions, dtype=np.float64) / self.length)
        return np.clip(0.9 * threshold + added, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ThresholdPolicy:
    """A token leaves at the first exit whose confidence is at least that exit's threshold.

    ``thresholds`` holds one number for each exit but the last, where all remaining tokens leave.
    No token leaves at a threshold of ``inf``, and every token at ``-inf``.
    """

    thresholds: tuple[float, ...]
    decay: Decay | None = None

    def __post_init__(self) -> None:
        for threshold in self.thresholds:
            if math.isnan(threshold):
                raise ConfigError("threshold: expected a number, got nan")

    @classmethod
    def of(
        cls, threshold: float | Sequence[float], num_exits: int, *, decay: Decay | None = None
    ) -> "ThresholdPolicy":
        """Make a policy from one threshold for all exits, or one for each of them but the last."""
        early = num_exits - 1
        if isinstance(threshold, Sequence):
            if len(threshold) != early:
                raise ConfigError(
                    f"thresholds: expected {early}, one for each exit but the last, "
                    f"got {len(threshold)}"
                )
            return cls(thresholds=tuple(float(value) for value in threshold), decay=decay)
        return cls(thresholds=(float(threshold),) * early, decay=decay)

    def used(self, exit_layers: Sequence[int]) -> tuple[int, ...]:
        """Return the early exits at which a token may leave: their thresholds are below inf."""
        pairs = zip(exit_layers, self.thresholds, strict=False)
        return tuple(layer for layer, threshold in pairs if threshold < math.inf)

    def leaving(
        self, confidence: NDArray[np.float32], positions: NDArray[Any] | None = None
    ) -> NDArray[np.bool_]:
        """Return (exits, tokens), True at the exit where a token leaves.

        ``confidence`` is (exits - 1, tokens). ``positions`` (tokens,), from 0 in each sequence,
        are needed if the threshold decays.
        """
        scores = list(confidence[: len(self.thresholds)])
        bounds = [self.bound(index, confidence.dtype, positions) for index in range(len(scores))]
        return _first(scores, bounds, tokens=confidence.shape[1])

    def leaves(
        self, index: int, scores: Float[Tensor, "*B"], positions: Int[Tensor, "*B"] | None = None
    ) -> Bool[Tensor, "*B"]:
        """Return which of the tokens that reached the ``index``-th exit (from 0) leave there.

        Without a decay the bound is a plain number, which needs no synchronisation with a GPU.
        """
        dtype = np.dtype(str(scores.dtype).removeprefix("torch."))
        at = None if positions is None else positions.cpu().numpy()
        bound = self.bound(index, dtype, at)
        if isinstance(bound, np.ndarray):
            return scores >= torch.from_numpy(bound).to(scores.device)
        return scores >= float(bound)

    def bound(self, index: int, dtype: np.dtype[Any], positions: NDArray[Any] | None = None) -> Any:
        """Return the bound that a score of this precision must reach at the ``index``-th exit.

        Exits are counted from 0. The bound is one number, or one for each of ``positions`` if
        the threshold decays.
        """
        threshold = self.thresholds[index]
        if self.decay is None:
            return _rounded(threshold, dtype)
        if positions is None:
            raise ConfigError("decay: expected the positions of the tokens, got none")
        return _in_precision(self.decay.threshold(threshold, positions), dtype)


@dataclass(frozen=True, kw_only=True)
class GainPolicy:
    """A token leaves where expected loss + price x cost is least, as predicted by the exit's gate.

    The ``gain`` gate of an exit predicts the loss of leaving here, m_e = E[KL(p_L || p_e)], and at
    each later exit, m_e'; at the last layer the loss is 0. The token leaves if m_e is at most the
    least m_e' + price x (cost_e' - cost_e) of the later exits. A later gate has more information
    and decides again, so running on is worth slightly more than that; if the predictions are
    right, the rule does at least as well as choosing the best exit now. With one exit before the
    last it is the threshold -price x (cost_L - cost_e) on ``gain``.

    ``price`` is in nats for a unit of cost; ``costs`` (ascending) holds the cost of leaving at each
    exit, the last one included, such as FLOPs%.
    """

    price: float
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.price >= 0:
            raise ConfigError(f"price: expected a number of at least 0, got {self.price}")

    def extra(self, index: int) -> tuple[float, ...]:
        """Return price x cost of running on from the ``index``-th exit to each later one."""
        return tuple(self.price * (cost - self.costs[index]) for cost in self.costs[index + 1 :])

    def advantage(self, index: int, expected_kl: Any) -> Any:
        """Return the largest loss, in nats, that continuing saves, minus price x its cost.

        ``index`` is the exit, from 0. ``expected_kl`` (K, tokens), NumPy or torch, is the
        prediction of its gate for this exit and each later one but the last. A token leaves if
        the advantage is at most 0.
        """
        here, *later = expected_kl
        extra = self.extra(index)
        best = here - extra[-1]
        for loss, cost in zip(later, extra, strict=False):
            saved = here - loss - cost
            best = np.maximum(best, saved) if isinstance(best, np.ndarray) else best.maximum(saved)
        return best

    def leaving(self, expected_kl: Sequence[NDArray[np.float32]]) -> NDArray[np.bool_]:
        """Return (exits, tokens), True at the exit where a token leaves.

        ``expected_kl`` holds an array, as for ``advantage``, for each exit but the last.
        """
        savings = [-self.advantage(index, losses) for index, losses in enumerate(expected_kl)]
        return _first(savings, [0.0] * len(savings), tokens=expected_kl[0].shape[1])

    def leaves(self, index: int, expected_kl: Float[Tensor, "*B K"]) -> Bool[Tensor, "*B"]:
        """Return which of the tokens that reached the ``index``-th exit (from 0) leave there."""
        leaving: Tensor = self.advantage(index, expected_kl.unbind(dim=-1)) <= 0
        return leaving


def _first(scores: Sequence[Any], bounds: Sequence[Any], *, tokens: int) -> NDArray[np.bool_]:
    """Return (exits, tokens), True at the first exit whose score reaches its bound, or the last."""
    here = np.empty((len(bounds) + 1, tokens), dtype=np.bool_)
    staying = np.ones(tokens, dtype=np.bool_)
    for index, bound in enumerate(bounds):
        at_least = scores[index] >= bound
        np.logical_and(at_least, staying, out=here[index])
        staying &= ~at_least
    here[-1] = staying
    return here


@lru_cache(maxsize=1024)
def _rounded(threshold: float, dtype: np.dtype[Any]) -> Any:
    return _in_precision(threshold, dtype)


def _in_precision(threshold: Any, dtype: np.dtype[Any]) -> Any:
    """Round the threshold to the precision of the scores.

    A token whose score equals the rounded threshold leaves, in a trace and in a decoder. A
    threshold above 1 stays above 1, so no probability reaches it.
    """
    with np.errstate(over="ignore"):  # above the largest float32 it becomes infinite
        rounded = np.asarray(threshold, dtype=np.float64).astype(dtype)
    above = np.nextafter(dtype.type(1), dtype.type(np.inf))
    rounded = np.where((np.asarray(threshold) > 1) & (rounded <= 1), above, rounded)
    return rounded if rounded.ndim else rounded[()]
