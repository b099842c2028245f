"""One recipe against the static models: ratios at equal cost, intervals and paired tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from offramp.models.missing_kv import EXACT
from offramp.report.study_result import (
    Curve,
    Ratio,
    RoutedModel,
    Row,
    Spread,
    SpreadAt,
    StaticModel,
    TestedRatio,
)
from offramp.studies.statistics import Seeds, paired_test, stat
from offramp.studies.study.done import Done
from offramp.studies.study.frontier import (
    Floats,
    Frontier,
    FrontierKey,
    at,
    resampled,
)
from offramp.studies.study.static import (
    ByDraw,
    Curves,
    StaticCurves,
    StaticModels,
    areas,
    at_cost,
    curves_of,
)

POINTS = (50.0, 60.0, 65.0, 80.0, 100.0)
"""flops_pct at which frontiers are compared."""
DRAWS = 1000
"""Number of bootstrap samples."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What every recipe is compared with: the static models of each seed."""

    static: Sequence[Done]
    seeds: Sequence[int]
    depth: int
    "Layers of the standard model."
    compared_at: float
    "flops_pct of the comparison that a row's ``p_value`` is about."

    @cached_property
    def models(self) -> StaticModels:
        """The static models, by kind and seed."""
        return StaticModels(done=self.static, seeds=self.seeds, depth=self.depth)

    @cached_property
    def draws(self) -> tuple[Floats, Any]:
        """Bootstrap samples: how often each stretch is drawn (B, S), and the drawn seeds (B, n)."""
        rng = np.random.default_rng(0)
        stretches = len(next(iter(self.models.plain.values())).tokens)
        seeds = rng.integers(len(self.seeds), size=(DRAWS, len(self.seeds)))
        return resampled(rng, stretches, DRAWS), seeds

    @cached_property
    def static_curves(self) -> StaticCurves:
        """The static models' curves."""
        return self.models.curves(self.draws[0])

    def static_model(self, entry: Done) -> StaticModel:
        """The figures of a static model's run."""
        (flops,), (nll,) = self.models.full(entry).curve()
        return StaticModel(
            layers=entry.layers,
            source=entry.source,
            seed=entry.seed,
            name=entry.run.name,
            compute_pct=100.0 * entry.layers / self.depth,
            flops_pct=float(flops),
            ppl=float(np.exp(nll)),
        )

    def routed_model(self, entry: Done) -> RoutedModel:
        """The figures of a run with exits: its first measure's curves as points, too."""
        frontiers = {
            confidence: {kv: self._columns(entry, confidence, kv) for kv in entry.run.conventions}
            for confidence in entry.run.measures
        }
        first = entry.run.measures[0]
        return RoutedModel(
            label=entry.run.label,
            seed=entry.seed,
            name=entry.run.name,
            config=entry.record.config,
            exit_ppl=entry.record.exit_ppl,
            confidence=first,
            frontier={
                kv: tuple(zip(curve.compute_pct, curve.ppl, curve.threshold, strict=True))
                for kv, curve in frontiers[first].items()
            },
            frontiers=frontiers,
        )

    def row(
        self, entries: Sequence[Done], confidence: str, kv: str, baseline: Sequence[Done] | None
    ) -> Row:
        """One recipe by one measure and with one meaning of the missing keys and values."""
        mine = self._by_seed(entries)
        curves, static = self._curves(mine, confidence, kv), self.static_curves
        layers = sorted(mine[0].record.exit_ppl)
        exit_ppl = {
            layer: _spread([entry.record.exit_ppl[layer] for entry in mine]) for layer in layers
        }
        standard = static.standard
        final = [self._final(entry) for entry in mine]
        points = sorted({*POINTS, self.compared_at})
        own = {point: at_cost(curves, point) for point in points}
        to_static = {point: self._ratio(own[point], static.at_cost(point)) for point in points}
        to_baseline = final_to_baseline = None
        if baseline:
            other = self._by_seed(baseline)
            theirs = at_cost(self._curves(other, confidence, kv), self.compared_at)
            to_baseline = _tested(self._ratio(own[self.compared_at], theirs))
            final_to_baseline = _tested(self._ratio(final, [self._final(entry) for entry in other]))
        return Row(
            label=mine[0].run.label,
            confidence=confidence,
            missing_kv=kv,
            loss_weights=mine[0].run.training.loss_weights,
            exit_ppl=exit_ppl,
            final_ppl=exit_ppl[layers[-1]],
            ppl_at={point: self._spread_at(own[point]) for point in points},
            compute_pct_at={
                point: _known(
                    np.mean([self._compute_at(entry, confidence, kv, point) for entry in mine])
                )
                for point in points
            },
            ratio_to_static_at=to_static,
            ratio_to_standard_at={point: self._ratio(own[point], standard) for point in points},
            final_to_standard=_tested(self._ratio(final, standard)),
            area=_tested(self._ratio(areas(curves), static.areas)),
            to_static=_tested(to_static[self.compared_at]),
            to_baseline=to_baseline,
            final_to_baseline=final_to_baseline,
        )

    def _routed(self, entry: Done, confidence: str, kv: str) -> Frontier:
        """A frontier of the run, by ``kv`` or what stands for it in a model without that meaning.

        Beside a model whose exits are complete others show what decoding does, ``propagate``.
        """
        mine = entry.run.conventions
        if kv not in mine:
            kv = EXACT if EXACT in mine else "propagate"
        key = FrontierKey(text="test", confidence=confidence, missing_kv=kv)
        return self.models.scaled(entry, entry.frontiers[key])

    def _columns(self, entry: Done, confidence: str, kv: str) -> Curve:
        frontier = self._routed(entry, confidence, kv)
        flops, nll = frontier.curve()
        compute, _ = frontier.curve(cost="compute_pct")
        return Curve(
            threshold=tuple(frontier.thresholds.tolist()),
            compute_pct=tuple(compute.tolist()),
            flops_pct=tuple(flops.tolist()),
            ppl=tuple(np.exp(nll).tolist()),
        )

    def _by_seed(self, entries: Sequence[Done]) -> list[Done]:
        by_seed = {entry.seed: entry for entry in entries}
        return [by_seed[seed] for seed in self.seeds]

    def _curves(self, entries: Sequence[Done], confidence: str, kv: str) -> list[Curves]:
        return [curves_of(self._routed(entry, confidence, kv), self.draws[0]) for entry in entries]

    def _final(self, entry: Done) -> ByDraw:
        full = self.models.full(entry)
        return full.curve()[1][0], full.curve(self.draws[0])[1][:, 0]

    def _compute_at(self, entry: Done, confidence: str, kv: str, point: float) -> float:
        frontier = self._routed(entry, confidence, kv)
        flops, compute = (frontier.curve(cost=cost)[0] for cost in ("flops_pct", "compute_pct"))
        return float(at(flops, compute, point))

    def _interval(self, draws: Sequence[Floats]) -> tuple[float, float] | None:
        """95% interval of the geometric mean over seeds, of each seed's draws (B,) in nats."""
        stacked = np.asarray(draws)
        if np.isnan(stacked).any():
            return None
        means = np.take_along_axis(stacked, self.draws[1].T, axis=0).mean(axis=0)
        low, high = np.exp(np.quantile(means, [0.025, 0.975])).tolist()
        return low, high

    def _spread_at(self, own: Sequence[ByDraw]) -> SpreadAt:
        spread = _spread(np.exp(np.asarray([nll for nll, _ in own])))
        return SpreadAt(
            mean=spread.mean,
            std=spread.std,
            values=spread.values,
            interval=self._interval([draws for _, draws in own]),
        )

    def _ratio(self, own: Sequence[ByDraw], other: Sequence[ByDraw]) -> Ratio:
        """A ratio of PPLs: geometric mean over seeds, each seed's, interval and paired test."""
        differences = np.asarray([a[0] - b[0] for a, b in zip(own, other, strict=True)])
        draws = [a[1] - b[1] for a, b in zip(own, other, strict=True)]
        known = bool(np.isfinite(differences).all())
        return Ratio(
            mean=_known(np.exp(differences.mean())),
            values=tuple(_known(value) for value in np.exp(differences)),
            interval=self._interval(draws),
            p_value=paired_test(differences) if known else None,
        )


def _known(value: Any) -> float | None:
    """The number; None for NaN: no policy reaches the cost."""
    return None if math.isnan(value) else float(value)


def _spread(values: Sequence[float] | Seeds) -> Spread:
    found = stat(values)
    return Spread(
        mean=_known(found["mean"]),
        std=None if found["std"] is None else _known(found["std"]),
        values=tuple(_known(value) for value in found["values"]),
    )


def _tested(ratio: Ratio) -> TestedRatio:
    return TestedRatio(**vars(ratio))
