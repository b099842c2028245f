"""The static models that recipes are compared with: at each cost, the best of every kind.

A kind is the plain models, a point for each depth, or those whose blocks above one source share
keys and values. A model of at most source + 1 layers is the same in both kinds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from offramp.studies.study.done import Done
from offramp.studies.study.frontier import (
    Floats,
    Frontier,
    full_depth,
    join,
    over,
    scaled,
)

AREA = np.linspace(50.0, 100.0, 51)
"""flops_pct over which the area between two frontiers is taken."""

ByDraw = tuple[Floats, Floats]
"""Mean NLL on the text, and on each bootstrap sample of it (B,)."""
Curves = tuple[Floats, Floats, Floats, Floats]
"""(cost, NLL) on the text, then (cost, NLL) on each bootstrap sample of it."""


def curves_of(frontier: Frontier, draws: Floats) -> Curves:
    """The frontier's curve on the text and on each sample of its stretches (B, S)."""
    return (*frontier.curve(), *frontier.curve(draws))


def at_cost(curves: Sequence[Curves], cost: float) -> list[ByDraw]:
    """Mean NLL at a cost, one pair a seed; NaN where no policy costs that."""
    return [(text[..., 0], draws[..., 0]) for text, draws in _over(curves, np.asarray([cost]))]


def areas(curves: Sequence[Curves]) -> list[ByDraw]:
    """Mean NLL over AREA, one pair a seed: the area under a frontier."""
    return [(text.mean(-1), draws.mean(-1)) for text, draws in _over(curves, AREA)]


def _over(curves: Sequence[Curves], costs: Floats) -> list[ByDraw]:
    """Mean NLL at each cost, a pair a seed: (C,) and (B, C)."""
    return [(over(c[0], c[1], costs), over(c[2], c[3], costs)) for c in curves]


@dataclass(frozen=True, kw_only=True)
class StaticModels:
    """The static models of each seed."""

    done: Sequence[Done]
    seeds: Sequence[int]
    depth: int
    "Layers of the standard model."

    @cached_property
    def full_flops(self) -> float:
        """FLOPs of a token in the standard model."""
        return max(entry.record.full_flops for entry in self.done if entry.source is None)

    def full(self, entry: Done) -> Frontier:
        """The frontier of a run at full depth, costs in percent of the standard model."""
        return self.scaled(entry, entry.frontiers[full_depth("test")])

    def scaled(self, entry: Done, frontier: Frontier) -> Frontier:
        """A frontier of the run with its costs in percent of the standard model.

        A run counts in percent of its own full model, which is cheaper if it is shallower or has
        a source of keys and values.
        """
        return scaled(
            frontier,
            compute=entry.layers / self.depth,
            flops=entry.record.full_flops / self.full_flops,
        )

    @cached_property
    def plain(self) -> dict[int, Frontier]:
        """By seed, the plain models' frontier: a point for each depth."""
        return self._kind(None)

    def curves(self, draws: Floats) -> "StaticCurves":
        """Their curves on the text and on samples of its stretches (B, S)."""
        sources = {entry.source for entry in self.done if entry.source is not None}
        kinds = [self.plain, *(self._kind(source) for source in sorted(sources))]
        return StaticCurves(
            kinds=[[curves_of(kind[seed], draws) for seed in self.seeds] for kind in kinds]
        )

    def _kind(self, source: int | None) -> dict[int, Frontier]:
        """By seed, the frontier of the models with this source, plain ones where they are equal."""

        def belongs(entry: Done) -> bool:
            same = source is not None and entry.layers <= source + 1
            return entry.source == source or (entry.source is None and same)

        shallow_first = sorted(filter(belongs, self.done), key=lambda entry: entry.layers)
        return {
            seed: join([self.full(entry) for entry in shallow_first if entry.seed == seed])
            for seed in self.seeds
        }


@dataclass(frozen=True, kw_only=True)
class StaticCurves:
    """The static models' curves, by kind and seed; the plain kind is the first."""

    kinds: Sequence[Sequence[Curves]]

    @property
    def standard(self) -> list[ByDraw]:
        """Mean NLL of the standard model, one pair a seed."""
        return [(curve[1][..., -1], curve[3][..., -1]) for curve in self.kinds[0]]

    def at_cost(self, cost: float) -> list[ByDraw]:
        """Mean NLL at a cost, one pair a seed: that of the kind which is best there."""
        return [(text[..., 0], draws[..., 0]) for text, draws in self._best(np.asarray([cost]))]

    @property
    def areas(self) -> list[ByDraw]:
        """Mean NLL over AREA, one pair a seed: of the kind that is best at each cost."""
        return [(text.mean(-1), draws.mean(-1)) for text, draws in self._best(AREA)]

    def _best(self, costs: Floats) -> list[ByDraw]:
        """The least NLL of all kinds at each cost, a pair a seed: (C,) and (B, C)."""
        kinds = [_over(kind, costs) for kind in self.kinds]
        return [
            (np.fmin.reduce([text for text, _ in of]), np.fmin.reduce([draws for _, draws in of]))
            for of in zip(*kinds, strict=True)
        ]
