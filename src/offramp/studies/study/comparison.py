"""One recipe against the static models: ratios at equal cost, intervals and paired tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from offramp.files import read_json
from offramp.studies.statistics import paired_test, stat
from offramp.studies.study.frontier import (
    Floats,
    Frontier,
    at,
    join,
    load_frontiers,
    mean_between,
    resampled,
    scaled,
)
from offramp.studies.study.run import FRONTIERS, TIMING, StudyRun

POINTS = (50, 60, 65, 80, 100)
"""flops_pct at which frontiers are compared."""
AREA = np.linspace(50.0, 100.0, 51)
"""The area between two frontiers is taken over these."""
DRAWS = 1000
CONVENTIONS = ("recompute", "propagate")


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished run, as the summary reads it."""

    run: StudyRun
    folder: Path

    @cached_property
    def about(self) -> Any:
        """The content of run.json."""
        return read_json(self.folder / "run.json")

    @cached_property
    def frontiers(self) -> dict[str, Frontier]:
        """By text/confidence/missing_kv, costs in percent of the run's own full model."""
        return load_frontiers(self.folder / FRONTIERS)

    @cached_property
    def timing(self) -> Any:
        """The content of timing.json."""
        return read_json(self.folder / TIMING)

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.run.training.seed

    @property
    def exit_ppl(self) -> dict[int, float]:
        """On the test text, by exit layer."""
        return {int(layer): ppl for layer, ppl in self.about["exit_ppl"].items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What every recipe is compared with: the static models of each seed."""

    static: Sequence[Done]
    seeds: Sequence[int]
    depth: int
    compared_at: float
    "flops_pct of the comparison that a row's ``p_value`` is about."

    @cached_property
    def full_flops(self) -> float:
        """Of the standard model."""
        return max(float(entry.about["flops"]["full"]) for entry in self.static)

    @cached_property
    def draws(self) -> tuple[Floats, Any]:
        """How often each stretch of text is drawn (B, S), and which seeds (B, n), as places."""
        rng = np.random.default_rng(0)
        stretches = len(next(iter(self.statics.values())).tokens)
        seeds = rng.integers(len(self.seeds), size=(DRAWS, len(self.seeds)))
        return resampled(rng, stretches, DRAWS), seeds

    @cached_property
    def statics(self) -> dict[int, Frontier]:
        """By seed, the static models' frontier: a point for each depth."""
        return {
            seed: join(
                [
                    self.of(entry, "full", "recompute")
                    for entry in sorted(
                        self.static, key=lambda entry: entry.run.model.num_hidden_layers
                    )
                    if entry.seed == seed
                ]
            )
            for seed in self.seeds
        }

    @cached_property
    def static_curves(self) -> dict[int, tuple[Any, Any, Any, Any]]:
        """By seed: (cost, NLL) on the text, then on each draw of it."""
        counts = self.draws[0]
        return {
            seed: (*frontier.curve(), *frontier.curve(counts))
            for seed, frontier in self.statics.items()
        }

    def of(self, entry: Done, confidence: str, kv: str) -> Frontier:
        """On the test text, costs in percent of the standard model."""
        return scaled(
            entry.frontiers[f"test/{confidence}/{kv}"],
            compute=entry.run.model.num_hidden_layers / self.depth,
            flops=entry.about["flops"]["full"] / self.full_flops,
        )

    def static_entry(self, entry: Done) -> dict[str, Any]:
        """A static model's run."""
        (flops,), (nll,) = self.of(entry, "full", "recompute").curve()
        layers = entry.run.model.num_hidden_layers
        return {
            "layers": layers,
            "seed": entry.seed,
            "name": entry.run.name,
            "compute_pct": 100.0 * layers / self.depth,
            "flops_pct": float(flops),
            "ppl": float(np.exp(nll)),
        }

    def routed_entry(self, entry: Done) -> dict[str, Any]:
        """A run: its frontier by the first measure, as points, and all of them, as columns."""
        frontiers = {
            confidence: {kv: self._columns(entry, confidence, kv) for kv in CONVENTIONS}
            for confidence in entry.run.measures
        }
        first = entry.run.measures[0]
        points = ("compute_pct", "ppl", "threshold")
        return {
            "label": entry.run.label,
            "seed": entry.seed,
            "name": entry.run.name,
            "config": entry.about["config"],
            "exit_ppl": entry.exit_ppl,
            "confidence": first,
            "frontier": {
                kv: [list(point) for point in zip(*(of[name] for name in points), strict=True)]
                for kv, of in frontiers[first].items()
            },
            "frontiers": frontiers,
        }

    def _columns(self, entry: Done, confidence: str, kv: str) -> dict[str, list[float]]:
        frontier = self.of(entry, confidence, kv)
        flops, nll = frontier.curve()
        compute, _ = frontier.curve(cost="compute_pct")
        columns = {
            "threshold": frontier.thresholds,
            "compute_pct": compute,
            "flops_pct": flops,
            "ppl": np.exp(nll),
        }
        return {name: column.tolist() for name, column in columns.items()}

    def row(
        self, entries: Sequence[Done], confidence: str, kv: str, baseline: Sequence[Done] | None
    ) -> dict[str, Any]:
        """One recipe with one measure and one meaning of the missing keys and values."""
        mine = self._by_seed(entries)
        curves, static = self._curves(mine, confidence, kv), self._static_curves
        layers = sorted(mine[0].exit_ppl)
        standard = [(curve[1][..., -1], curve[3][..., -1]) for curve in static]
        final = [self._final(entry) for entry in mine]
        row: dict[str, Any] = {
            "label": mine[0].run.label,
            "confidence": confidence,
            "missing_kv": kv,
            "loss_weights": mine[0].run.training.loss_weights,
            "exit_ppl": {
                layer: stat([entry.exit_ppl[layer] for entry in mine]) for layer in layers
            },
            "final_ppl": stat([entry.exit_ppl[layers[-1]] for entry in mine]),
            "ppl_at": {},
            "compute_pct_at": {},
            "ratio_to_static_at": {},
            "ratio_to_standard_at": {},
            "final_to_standard": self._ratio(final, standard),
            "area": self._ratio(_areas(curves), _areas(static)),
        }
        for point in sorted({*POINTS, self.compared_at}):
            key, own = f"{point:g}", self._at(curves, point)
            nll = np.asarray([values for values, _ in own])
            row["ppl_at"][key] = stat(np.exp(nll)) | self._interval([of for _, of in own])
            row["compute_pct_at"][key] = float(
                np.mean([self._compute_at(entry, confidence, kv, point) for entry in mine])
            )
            row["ratio_to_static_at"][key] = self._ratio(own, self._at(static, point))
            row["ratio_to_standard_at"][key] = self._ratio(own, standard)
        row["to_static"] = dict(row["ratio_to_static_at"][f"{self.compared_at:g}"])
        if baseline:
            other = self._by_seed(baseline)
            theirs = self._curves(other, confidence, kv)
            row["to_baseline"] = self._ratio(
                self._at(curves, self.compared_at), self._at(theirs, self.compared_at)
            )
            row["final_to_baseline"] = self._ratio(final, [self._final(entry) for entry in other])
        return row

    def _by_seed(self, entries: Sequence[Done]) -> list[Done]:
        by_seed = {entry.seed: entry for entry in entries}
        return [by_seed[seed] for seed in self.seeds]

    @property
    def _static_curves(self) -> list[Any]:
        return [self.static_curves[seed] for seed in self.seeds]

    def _curves(self, entries: Sequence[Done], confidence: str, kv: str) -> list[Any]:
        frontiers = [self.of(entry, confidence, kv) for entry in entries]
        return [(*one.curve(), *one.curve(self.draws[0])) for one in frontiers]

    def _final(self, entry: Done) -> tuple[Floats, Floats]:
        full = self.of(entry, "full", "recompute")
        return full.curve()[1][0], full.curve(self.draws[0])[1][:, 0]

    def _compute_at(self, entry: Done, confidence: str, kv: str, point: float) -> float:
        frontier = self.of(entry, confidence, kv)
        flops, compute = (frontier.curve(cost=cost)[0] for cost in ("flops_pct", "compute_pct"))
        return float(at(flops, compute, point))

    def _at(self, curves: Sequence[Any], cost: float) -> list[tuple[Floats, Floats]]:
        """By seed: mean NLL at a cost, and on each draw of the text (B,)."""
        return [(at(c[0], c[1], cost), at(c[2], c[3], cost)) for c in curves]

    def _interval(self, draws: Sequence[Floats]) -> dict[str, Any]:
        """95% interval of the geometric mean over seeds, of a seed's draws (B,) in nats."""
        stacked = np.asarray(draws)
        if np.isnan(stacked).any():
            return {"interval": None}
        means = np.take_along_axis(stacked, self.draws[1].T, axis=0).mean(axis=0)
        return {"interval": np.exp(np.quantile(means, [0.025, 0.975])).tolist()}

    def _ratio(self, own: Sequence[Any], other: Sequence[Any]) -> dict[str, Any]:
        """A ratio of PPLs: geometric mean over seeds, each seed's, interval and paired test."""
        differences = np.asarray([a[0] - b[0] for a, b in zip(own, other, strict=True)])
        draws = [a[1] - b[1] for a, b in zip(own, other, strict=True)]
        known = bool(np.isfinite(differences).all())
        return {
            "mean": float(np.exp(differences.mean())),
            "values": np.exp(differences).tolist(),
            **self._interval(draws),
            "p_value": paired_test(differences) if known else None,
        }


def _areas(curves: Sequence[Any]) -> list[tuple[Floats, Floats]]:
    """By seed: mean NLL over AREA, and on each draw of the text (B,)."""
    return [(mean_between(c[0], c[1], AREA), mean_between(c[2], c[3], AREA)) for c in curves]
