"""A model's policies on a text, from one that lets every token leave early to the full model.

Losses and costs are summed over stretches of the text, not over tokens or windows: neighbouring
sequences come from the same article, so the bootstrap resamples stretches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.routed import RoutedTrace
from offramp.evaluation.sweep import finite_nll
from offramp.evaluation.trace import ExitTrace
from offramp.files import writing
from offramp.reading import parsing, read_arrays

Floats = NDArray[np.float64]
STRETCHES = 64
"""A text is divided into this many stretches of neighbouring sequences, if it has as many."""
_ARRAYS = ("thresholds", "nll", "compute_pct", "flops_pct", "tokens")
_NO_EARLY_EXIT = "full"
"""What stands for the measure in the name of the frontier at which no token leaves early."""

TextName = Literal["held_out", "test"]


@dataclass(frozen=True, kw_only=True)
class FrontierKey:
    """Which of a model's frontiers."""

    text: TextName
    confidence: str | None
    "The measure by which tokens leave; None where no token leaves early: one policy."
    missing_kv: str


def full_depth(text: TextName) -> FrontierKey:
    """The frontier whose one policy runs all layers for every token."""
    return FrontierKey(text=text, confidence=None, missing_kv="recompute")


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """K policies on S stretches of text, ascending in cost on the text where they were chosen."""

    thresholds: Floats
    """(K,) score at and above which a token leaves; at -inf every token leaves at the first exit,
    at inf none does."""
    nll: Floats
    "(K, S) negative log-likelihood in nats, summed over the tokens of a stretch."
    compute_pct: Floats
    "(K, S) layers run, in percent, summed over the tokens of a stretch."
    flops_pct: Floats
    "(K, S) FLOPs in percent, heads and gates counted, summed over the tokens of a stretch."
    tokens: Floats
    "(S,) number of tokens of each stretch."

    def curve(self, counts: Floats | None = None, *, cost: str = "flops_pct") -> tuple[Any, Any]:
        """(cost in percent, mean NLL), each (K,), or (B, K) for ``counts`` (B, S).

        ``counts`` is how often each stretch was drawn (default: once).
        """
        weights = np.ones_like(self.tokens) if counts is None else counts
        total = weights @ self.tokens
        x, y = (weights @ array.T for array in (getattr(self, cost), self.nll))
        return x / total[..., None], y / total[..., None]

    def whole(self) -> "Frontier":
        """The same policies with the whole text as one stretch, for a text not resampled."""
        sums = {name: getattr(self, name).sum(-1, keepdims=True) for name in _ARRAYS[1:]}
        return replace(self, **sums)


def save_frontiers(path: Path, frontiers: Mapping[FrontierKey, Frontier]) -> None:
    """Write frontiers to an npz file, sums as float32."""
    arrays: dict[str, Any] = {}
    for key, frontier in frontiers.items():
        name = f"{key.text}/{key.confidence or _NO_EARLY_EXIT}/{key.missing_kv}"
        arrays |= {f"{name}/{array}": getattr(frontier, array).astype("f4") for array in _ARRAYS}
        arrays[f"{name}/thresholds"] = frontier.thresholds
    with writing(path):
        np.savez_compressed(path, **arrays)


def load_frontiers(path: Path) -> dict[FrontierKey, Frontier]:
    """Read the frontiers of ``save_frontiers``. Raises CheckpointError if the file is damaged."""
    expected = "the frontiers of a run of offramp study"
    stored = read_arrays(path, expected)
    names = sorted({name.rpartition("/")[0] for name in stored})
    with parsing(path, expected):
        return {
            _key(name): Frontier(**{of: stored[f"{name}/{of}"].astype("f8") for of in _ARRAYS})
            for name in names
        }


def _key(name: str) -> FrontierKey:
    text, confidence, missing_kv = name.split("/")
    return FrontierKey(
        text="test" if text == "test" else "held_out",
        confidence=None if confidence == _NO_EARLY_EXIT else confidence,
        missing_kv=missing_kv,
    )


def traced(
    trace: ExitTrace, leaving: Sequence[NDArray[np.bool_]], thresholds: Sequence[float], costs: Any
) -> Frontier:
    """The frontier of policies under ``recompute``.

    Of each policy, ``leaving`` holds (E, N), where each token leaves, and ``costs`` the flops_pct
    (E,) of leaving there.
    """
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
    """The frontier of policies under ``propagate``: of each a trace, and flops_pct (E,)."""
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
    """The frontier with its costs multiplied: a shallower model's in percent of a deeper one's."""
    return replace(
        frontier,
        compute_pct=frontier.compute_pct * compute,
        flops_pct=frontier.flops_pct * flops,
    )


def at(x: Floats, y: Floats, cost: float) -> Floats:
    """Mean NLL at a cost, interpolated; NaN below the cheapest policy. (..., K) -> (...)."""
    return over(x, y, np.asarray([cost]))[..., 0]


def over(x: Floats, y: Floats, costs: Floats) -> Floats:
    """Mean NLL at each of C costs, interpolated. (..., K) -> (..., C).

    It is NaN below the cheapest policy. At a higher cost than the full model's that model counts.
    """
    flat = zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), strict=True)
    found = [_interpolate(xs, ys, costs) for xs, ys in flat]
    return np.asarray(found).reshape(*x.shape[:-1], len(costs))


def _interpolate(x: Floats, y: Floats, costs: Floats) -> Floats:
    """NLL at the costs. Policies that cost as much as the last, the full model, are left out.

    A policy that computes a score for every token and lets hardly any leave costs more than the
    full model, which computes none.
    """
    kept = np.append(x[:-1] < x[-1] - 1e-9, True)
    order = np.argsort(x[kept], kind="stable")
    at, nll = x[kept][order], y[kept][order]
    slack = 1e-4  # percentage points
    return np.where(costs >= at[0] - slack, np.interp(costs, at, nll), np.nan)


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
