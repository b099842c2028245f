"""A study's runs -> study.json: array work on the traces.

A frontier is PPL against compute on the test text as the threshold moves; the thresholds are
quantiles of the confidence on the held-out training text, so nothing is chosen on the test text.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import ExitTrace
from offramp.experiments.statistics import holm, paired_test, stat
from offramp.experiments.study.plan import Study
from offramp.experiments.study.run import StudyRun
from offramp.models.checkpoint import read_json

SHARES = np.linspace(0.0, 1.0, 41)
"""Shares of held-out tokens that a threshold of the frontier lets leave at the first exit."""
POINTS = (50, 60, 65, 80, 100)
"""Shares of compute, in percent, at which frontiers are compared."""
COMPARED_AT = 80

Point = tuple[float, float, float]
"""(compute_pct, PPL, threshold)."""


def summarise(study: Study, runs: Sequence[StudyRun], folder: Path) -> dict[str, Any]:
    """The runs' figures, the static models', and a row of comparisons for each recipe."""
    check_equal_tokens(runs)
    depths = {
        run.label: run.model.num_hidden_layers for run in runs if len(run.model.exit_layers) == 1
    }
    entries = [_entry(run, folder / run.name) for run in runs]
    full = study.model.num_hidden_layers
    static = [
        {
            "layers": depths[entry["label"]],
            "compute_pct": 100.0 * depths[entry["label"]] / full,
            "seed": entry["seed"],
            "ppl": entry["exit_ppl"][depths[entry["label"]]],
            "seconds": entry["seconds"],
        }
        for entry in entries
        if entry["label"] in depths
    ]
    seeds = sorted({run.training.seed for run in runs})
    routed = [entry for entry in entries if entry["label"] not in depths]
    rows = [_row(recipe.label, routed, static, seeds, full) for recipe in study.recipes]
    for row, p_value in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_value"] = p_value
    return {
        "missing_kv": "recompute",
        "compared_at": COMPARED_AT,
        "train_tokens": runs[0].tokens,
        "seeds": seeds,
        "runs": routed,
        "static": static,
        "summary": rows,
    }


def check_equal_tokens(runs: Sequence[StudyRun]) -> None:
    """No summary compares runs that saw different numbers of tokens."""
    budgets = sorted({(run.tokens, run.test_tokens) for run in runs})
    if len(budgets) != 1:
        raise ValueError(f"runs: expected one budget of training and test tokens, got {budgets}")


def frontier(held_out: ExitTrace, test: ExitTrace) -> list[Point]:
    """Ascending in compute: from every token leaving at the first exit to none."""
    first = held_out.confidence["max_prob"][0]
    quantiles = np.unique(np.quantile(first, 1.0 - SHARES[1:-1]).astype(np.float64))
    rows = sweep(test, [-math.inf, *quantiles.tolist(), math.inf])
    return sorted((row.compute_pct, row.ppl, _one(row.threshold)) for row in rows)


def ppl_at(points: Sequence[Sequence[float]], compute: float) -> float:
    """PPL at a share of compute, log PPL being interpolated; NaN beyond the frontier's ends."""
    x, y = (np.asarray([point[axis] for point in points]) for axis in (0, 1))
    return float(np.exp(np.interp(compute, x, np.log(y), left=np.nan, right=np.nan)))


def _entry(run: StudyRun, folder: Path) -> dict[str, Any]:
    traces = [ExitTrace.load(folder / f"{name}.npz") for name in ("held_out", "test")]
    test = traces[1]
    early = len(test.exit_layers) > 1
    return {
        "label": run.label,
        "seed": run.training.seed,
        "name": run.name,
        "config": run.config,
        "train_tokens": run.tokens,
        "exit_ppl": {layer: test.ppl(layer) for layer in test.exit_layers},
        "frontier": {"recompute": frontier(*traces)} if early else {},
        "seconds": read_json(folder / "timing.json")["seconds"]["train"],
    }


def _row(
    label: str,
    routed: Sequence[dict[str, Any]],
    static: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    full: int,
) -> dict[str, Any]:
    mine = {entry["seed"]: entry for entry in routed if entry["label"] == label}
    values: dict[str, list[float]] = {str(point): [] for point in POINTS}
    to_standard: dict[str, list[float]] = {str(point): [] for point in POINTS}
    to_static: dict[str, list[float]] = {str(point): [] for point in POINTS}
    for seed in seeds:
        own = mine[seed]["frontier"]["recompute"]
        depths = sorted(
            (entry["compute_pct"], entry["ppl"]) for entry in static if entry["seed"] == seed
        )
        for point in POINTS:
            ppl = ppl_at(own, point)
            values[str(point)].append(ppl)
            to_standard[str(point)].append(ppl / depths[-1][1])
            to_static[str(point)].append(ppl / ppl_at(depths, point))
    layers = mine[seeds[0]]["exit_ppl"]
    return {
        "label": label,
        "loss_weights": mine[seeds[0]]["config"]["training"]["loss_weights"],
        "exit_ppl": {
            layer: stat([mine[seed]["exit_ppl"][layer] for seed in seeds]) for layer in layers
        },
        "final_ppl": stat([mine[seed]["exit_ppl"][full] for seed in seeds]),
        "ppl_at": {point: stat(found) for point, found in values.items()},
        "ratio_to_standard_at": {point: stat(found) for point, found in to_standard.items()},
        "ratio_to_static_at": {point: stat(found) for point, found in to_static.items()},
        "p_value": paired_test(np.log(to_static[str(COMPARED_AT)])),
        "seconds": stat([mine[seed]["seconds"] for seed in seeds]),
    }


def _one(threshold: float | tuple[float, ...]) -> float:
    assert isinstance(threshold, float)
    return threshold
