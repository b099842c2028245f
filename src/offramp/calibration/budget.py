"""Budget mode: find the thresholds with the lowest loss whose FLOPs% is within a budget."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from offramp.errors import ConfigError
from offramp.evaluation.cost import ModelCost
from offramp.evaluation.sweep import SweepRow, finite_nll, sweep
from offramp.evaluation.trace import ExitTrace

LARGEST_SUBSETS = 4
"""Largest number of early exits of which every subset is tried. With more early exits, only the
set of all of them and each single exit are tried."""
PRICES = np.geomspace(1e-5, 1.0, 16)
"""Prices of one percent of FLOPs, in nats, for a search over several exits."""
_ROUNDS = 10
_TOLERANCE = 1e-9


def keep_budget(
    trace: ExitTrace, flops_pct: float, *, cost: ModelCost, confidence: str = "max_prob"
) -> SweepRow:
    """Return the thresholds with the lowest PPL at which tokens cost at most ``flops_pct``.

    The result is exact for one early exit. For several, the search optimises one threshold at a
    time at each of ``PRICES``, for subsets of the exits, because an exit that is not evaluated
    costs nothing. Raises ConfigError if the cheapest exit costs more than the budget.
    """
    early = len(trace.exit_layers) - 1
    scores = trace.scores(confidence)[:-1]
    candidates = [_static(index, early) for index in range(early + 1)]
    for used in _subsets(early):
        search = _Search.of(trace, scores, cost, confidence, used)
        candidates += search.candidates(flops_pct)
    rows = sweep(trace, candidates, confidence=confidence, cost=cost)
    affordable = [row for row in rows if _flops(row) <= flops_pct + _TOLERANCE]
    if not affordable:
        cheapest = min(_flops(row) for row in rows)
        raise ConfigError(
            f"compute_budget: expected at least {cheapest:.2f}% of the full model's FLOPs, the "
            f"cost of the cheapest exit, got {flops_pct:g}"
        )
    return min(affordable, key=lambda row: (row.ppl, _flops(row)))


def _flops(row: SweepRow) -> float:
    assert row.flops_pct is not None
    return row.flops_pct


def _static(index: int, early: int) -> tuple[float, ...]:
    """Return thresholds at which every token leaves at this exit and no confidence is computed."""
    return (math.inf,) * index + (-math.inf,) * (early - index)


def _subsets(early: int) -> Iterator[tuple[int, ...]]:
    """Yield the subsets of early exits to try, as indices."""
    every = range(early)
    if early <= LARGEST_SUBSETS:
        return chain.from_iterable(combinations(every, size) for size in range(1, early + 1))
    return chain(((index,) for index in every), [tuple(every)])


@dataclass(frozen=True, kw_only=True)
class _Search:
    """A search for the thresholds of some of the exits; the other exits are not used."""

    used: tuple[int, ...]
    early: int
    scores: NDArray[np.float32]
    "(U, N) scores of the used exits."
    orders: NDArray[np.intp]
    "(U, N) indices of the tokens by descending score."
    loss: NDArray[np.float64]
    "(U + 1, N) loss of each token at each used exit and at the last exit, in nats."
    cost: NDArray[np.float64]
    "(U + 1,) FLOPs% of leaving at each used exit and at the last exit."

    @classmethod
    def of(
        cls,
        trace: ExitTrace,
        scores: NDArray[np.float32],
        cost: ModelCost,
        confidence: str,
        used: tuple[int, ...],
    ) -> "_Search":
        evaluated = [index in used for index in range(len(scores))]
        costs = np.array(cost.flops_pct_by_exit(confidence, evaluated=evaluated))
        rows = [*used, len(scores)]
        chosen = scores[list(used)]
        return cls(
            used=used,
            early=len(scores),
            scores=chosen,
            orders=np.argsort(-chosen, axis=1, kind="stable"),
            loss=finite_nll(trace)[rows],
            cost=costs[rows],
        )

    def candidates(self, budget: float) -> Iterator[tuple[float, ...]]:
        """Yield candidate threshold vectors, with a threshold for each early exit."""
        thresholds = [math.inf] * len(self.used)
        prices = PRICES if len(self.used) > 1 else ()
        for price in prices:
            for _ in range(_ROUNDS):
                before = list(thresholds)
                for index in range(len(self.used)):
                    thresholds[index] = self.best(index, thresholds, price=float(price))
                if thresholds == before:
                    break
            yield self.whole(thresholds)
            yield self.whole(self.filled(thresholds, budget))
        yield self.whole(self.filled([math.inf] * len(self.used), budget))

    def filled(self, thresholds: list[float], budget: float) -> list[float]:
        """Optimise each threshold in turn within the budget, beginning with the deepest exit."""
        thresholds = list(thresholds)
        for index in reversed(range(len(self.used))):
            thresholds[index] = self.best(index, thresholds, budget=budget)
        return thresholds

    def whole(self, thresholds: list[float]) -> tuple[float, ...]:
        """Return thresholds for all early exits, with infinity for those that are not used."""
        every = [math.inf] * self.early
        for index, threshold in zip(self.used, thresholds, strict=True):
            every[index] = threshold
        return tuple(every)

    def best(
        self,
        index: int,
        thresholds: list[float],
        *,
        price: float = 0.0,
        budget: float = math.inf,
    ) -> float:
        """Return the threshold of one exit with the least loss + price x cost.

        The other thresholds are fixed. Only thresholds within the budget count; if there are
        none, the cheapest threshold is returned.
        """
        tokens = self.scores.shape[1]
        at_exit = np.full(tokens, len(self.used))
        for later in reversed(range(len(self.used))):  # the exit of a token that continues here
            if later != index:
                at_exit[self.scores[later] >= thresholds[later]] = later
        here = self.orders[index][at_exit[self.orders[index]] > index]  # tokens that reach it
        kept_loss = self.loss[at_exit, np.arange(tokens)]
        losses = np.cumsum(np.append(kept_loss.sum(), (self.loss[index] - kept_loss)[here]))
        costs = np.cumsum(
            np.append(self.cost[at_exit].sum(), self.cost[index] - self.cost[at_exit[here]])
        )
        found = self.scores[index][here]
        ends = np.append(True, np.append(found[1:] != found[:-1], True)[: len(found)])
        total = np.where(ends, losses + price * costs, math.inf)
        affordable = costs <= tokens * (budget + _TOLERANCE)
        if not (affordable & ends).any():
            total, affordable = np.where(ends, costs, math.inf), ends
        leaving = int(np.argmin(np.where(affordable, total, math.inf)))
        return float(found[leaving - 1]) if leaving else math.inf
