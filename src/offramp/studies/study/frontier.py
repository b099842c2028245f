"""A model's policies on a text, from one that lets every token leave early to the full model.

Losses and costs are kept by stretch of the text, not by token or by window: neighbours are parts
of one article, so the bootstrap draws stretches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.routed import RoutedTrace
from offramp.evaluation.sweep import finite_nll
from offramp.evaluation.trace import ExitTrace

Floats = NDArray[np.float64]
STRETCHES = 64
"""Into how many stretches of neighbouring sequences a text falls, if it has so many sequences."""
_ARRAYS = ("thresholds", "nll", "compute_pct", "flops_pct", "tokens")


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """K policies on S stretches of text, ascending in cost on the text where they were chosen."""

    thresholds: Floats
    "(K,); -inf lets every token leave at the first exit, inf none. Of gain: its scores."
    nll: Floats
    "(K, S) nats, summed over a stretch's tokens."
    compute_pct: Floats
    "(K, S) likewise."
    flops_pct: Floats
    "(K, S) likewise."
    tokens: Floats
    "(S,) tokens of each stretch."

    def curve(self, counts: Floats | None = None, *, cost: str = "flops_pct") -> tuple[Any, Any]:
        """(cost in percent, mean NLL), each (K,), or (B, K) for ``counts`` (B, S).

        ``counts`` says how often each stretch was drawn (default: once).
        """
        weights = np.ones_like(self.tokens) if counts is None else counts
        total = weights @ self.tokens
        x, y = (weights @ array.T for array in (getattr(self, cost), self.nll))
        return x / total[..., None], y / total[..., None]

    def whole(self) -> "Frontier":
        """The text as one stretch, where nothing is to be resampled."""
        sums = {name: getattr(self, name).sum(-1, keepdims=True) for name in _ARRAYS[1:]}
        return replace(self, **sums)

    def save(self, into: dict[str, Any], name: str) -> None:
        """Put the arrays, sums in float32, into what ``np.savez_compressed`` is to write."""
        into |= {f"{name}/{array}": getattr(self, array).astype("f4") for array in _ARRAYS[1:]}
        into[f"{name}/thresholds"] = self.thresholds


def load_frontiers(path: Path) -> dict[str, Frontier]:
    """Every frontier of a file, by name."""
    with np.load(path, allow_pickle=False) as stored:
        names = sorted({key.rpartition("/")[0] for key in stored.files})
        return {
            name: Frontier(**{array: stored[f"{name}/{array}"].astype("f8") for array in _ARRAYS})
            for name in names
        }


def traced(
    trace: ExitTrace, leaving: Sequence[NDArray[np.bool_]], thresholds: Sequence[float], costs: Any
) -> Frontier:
    """Under ``recompute``: ``leaving`` holds (E, N) for each policy, ``costs`` flops_pct (E,)."""
    assert trace.sequence is not None
    nll = finite_nll(trace)
    compute = np.asarray(trace.exit_layers) * 100.0 / trace.num_layers
    sums = [
        _by_stretch(trace.sequence, [(here * nll).sum(0), compute @ here, np.asarray(cost) @ here])
        for here, cost in zip(leaving, costs, strict=True)
    ]
    return _frontier(trace.sequence, thresholds, sums)


def routed(
    traces: Sequence[RoutedTrace], thresholds: Sequence[float], costs: Any, num_layers: int
) -> Frontier:
    """Under ``propagate``: a trace and flops_pct (E,) for each policy."""
    sums = []
    for trace, cost in zip(traces, costs, strict=True):
        layers = np.asarray(trace.exit_layers)[trace.exits]
        values = [trace.nll, layers * 100.0 / num_layers, np.asarray(cost)[trace.exits]]
        sums.append(_by_stretch(trace.sequence, values))
    return _frontier(traces[0].sequence, thresholds, sums)


def join(parts: Sequence[Frontier]) -> Frontier:
    """The policies of several frontiers over the same stretches."""
    stacked = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in _ARRAYS
        if name != "tokens"
    }
    return Frontier(**stacked, tokens=parts[0].tokens)


def scaled(frontier: Frontier, *, compute: float, flops: float) -> Frontier:
    """The costs of a shallower model in percent of a deeper one's."""
    return replace(
        frontier,
        compute_pct=frontier.compute_pct * compute,
        flops_pct=frontier.flops_pct * flops,
    )


def at(x: Floats, y: Floats, cost: float) -> Floats:
    """Mean NLL at a cost, interpolated; NaN beyond the frontier's ends. (..., K) -> (...)."""
    flat = zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), strict=True)
    found = [_interpolate(xs, ys, np.asarray([cost]))[0] for xs, ys in flat]
    return np.asarray(found).reshape(x.shape[:-1])


def mean_between(x: Floats, y: Floats, costs: Floats) -> Floats:
    """Mean NLL over a grid of costs: an area, in nats. (..., K) -> (...)."""
    flat = zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), strict=True)
    found = [_interpolate(xs, ys, costs).mean() for xs, ys in flat]
    return np.asarray(found).reshape(x.shape[:-1])


def _interpolate(x: Floats, y: Floats, costs: Floats) -> Floats:
    """Policies that cost as much as the last one, the full model, or more are left out.

    One that asks every token and lets hardly any leave costs more than asking none.
    """
    kept = np.append(x[:-1] < x[-1] - 1e-9, True)
    order = np.argsort(x[kept], kind="stable")
    at, nll = x[kept][order], y[kept][order]
    slack = 1e-4  # of a percent: 100 is meant to be the full model
    inside = (costs >= at[0] - slack) & (costs <= at[-1] + slack)
    return np.where(inside, np.interp(costs, at, nll), np.nan)


def _by_stretch(sequence: NDArray[np.int32], values: Sequence[Any]) -> list[Floats]:
    """Sums of (N,) values over the tokens of each stretch of sequences."""
    sequences = int(sequence.max()) + 1
    stretch = sequence.astype(np.int64) * min(STRETCHES, sequences) // sequences
    return [np.bincount(stretch, weights=value).astype(np.float64) for value in values]


def _frontier(
    sequence: NDArray[np.int32], thresholds: Sequence[float], sums: Sequence[Sequence[Floats]]
) -> Frontier:
    nll, compute, flops = (np.stack([part[index] for part in sums]) for index in range(3))
    return Frontier(
        thresholds=np.asarray(thresholds, dtype=np.float64),
        nll=nll,
        compute_pct=compute,
        flops_pct=flops,
        tokens=_by_stretch(sequence, [np.ones(len(sequence))])[0],
    )


def resampled(rng: np.random.Generator, stretches: int, draws: int) -> Floats:
    """(B, S): how often each stretch is in each of ``draws`` bootstrap samples."""
    return rng.multinomial(stretches, np.full(stretches, 1 / stretches), size=draws).astype(float)
