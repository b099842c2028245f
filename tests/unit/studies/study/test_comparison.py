"""The ratios of a study's summary, on frontiers whose figures are known."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from offramp.studies.study.comparison import Comparison
from offramp.studies.study.frontier import Frontier, FrontierKey, full_depth
from offramp.studies.study.plan import Recipe
from offramp.studies.study.studies import STUDIES
from offramp.studies.study.summary import corrected

SEEDS = (0, 1)
STRETCHES = 4


def frontier(costs, ppl):
    """Every stretch of one token and alike, so that drawing text changes nothing."""

    def everywhere(values):
        return np.repeat(np.asarray(values, dtype=np.float64)[:, None], STRETCHES, axis=1)

    return Frontier(
        thresholds=np.zeros(len(costs)),
        nll=everywhere(np.log(ppl)),
        compute_pct=everywhere(costs),
        flops_pct=everywhere(costs),
        tokens=np.ones(STRETCHES),
    )


def done(label, layers, seed, *, flops, full, routed=None):
    """A run: costs and PPLs in percent of its own full model."""
    frontiers = {full_depth("test"): frontier([100.0], [full])}
    if routed:
        frontiers |= {
            FrontierKey(text="test", confidence="gain", missing_kv=kv): frontier(*routed)
            for kv in ("recompute", "propagate")
        }
    exits = {1: routed[1][0], layers: full} if routed else {layers: full}
    model = SimpleNamespace(num_hidden_layers=layers, exit_layers=tuple(exits))
    training = SimpleNamespace(loss_weights="", seed=seed)
    run = SimpleNamespace(label=label, model=model, training=training, measures=("gain",))
    record = SimpleNamespace(full_flops=flops, exit_ppl=exits)
    return SimpleNamespace(run=run, seed=seed, layers=layers, record=record, frontiers=frontiers)


@pytest.fixture
def comparison():
    static = [
        done("", layers, seed, flops=flops, full=ppl)
        for seed in SEEDS
        for layers, flops, ppl in ((1, 5.0, 8.0), (2, 10.0, 4.0))
    ]
    return Comparison(static=static, seeds=SEEDS, depth=2, compared_at=60.0)


def recipe(label, factors, *, final=3.6):
    return [
        done(label, 2, seed, flops=10.0, full=final, routed=([50.0, 100.0], [6.0 * by, final]))
        for seed, by in zip(SEEDS, factors, strict=True)
    ]


def test_ratios_are_ours_to_theirs_at_equal_cost(comparison):
    row = comparison.row(recipe("ours", (1.0, 1.1)), "gain", "recompute", None)
    static = row.ratio_to_static_at[50]
    assert static.values == pytest.approx([6 / 8, 6.6 / 8])
    assert static.mean == pytest.approx(0.75 * math.sqrt(1.1))
    assert static.interval == pytest.approx([0.75, 0.825])
    assert 0 < static.p_value < 1
    assert row.ratio_to_standard_at[50].values == pytest.approx([1.5, 1.65])
    assert row.final_to_standard.values == pytest.approx([0.9, 0.9])
    assert row.ppl_at[50].mean == pytest.approx(6.3)
    between = math.log(6.0) + 0.2 * (math.log(3.6) - math.log(6.0))  # 60 between 50 and 100
    theirs = math.log(8.0) + 0.2 * (math.log(4.0) - math.log(8.0))
    assert row.to_static.values[0] == pytest.approx(math.exp(between - theirs))
    assert row.area.values[0] == pytest.approx(math.sqrt(0.75 * 0.9))  # half way, in logs


def test_a_recipe_is_paired_with_its_baseline_seed_by_seed(comparison):
    base = recipe("base", (2.0, 1.0), final=3.0)
    row = comparison.row(recipe("ours", (1.0, 2.0)), "gain", "recompute", base[::-1])
    at_60 = [(6 * by) ** 0.8 * 3.6**0.2 for by in (1, 2)]
    base_60 = [(6 * by) ** 0.8 * 3.0**0.2 for by in (2, 1)]
    ratios = [a / b for a, b in zip(at_60, base_60, strict=True)]
    assert row.to_baseline.values == pytest.approx(ratios)
    assert row.final_to_baseline.values == pytest.approx([1.2, 1.2])


def test_no_test_counts_that_is_none(comparison):
    """Neither the baseline against itself nor a recipe that is only shown."""
    labels = ("base", "a", "b", "shown")
    recipes = tuple(Recipe(label=label, tested=label != "shown") for label in labels)
    study = replace(STUDIES["heads"], baseline="base", recipes=recipes)
    names = ("to_static", "area", "final_to_standard", "to_baseline", "final_to_baseline")
    base = recipe("base", (1.0, 1.1))
    row = comparison.row(base, "gain", "recompute", base)
    ratios = {name: replace(getattr(row, name), p_value=0.01) for name in names}
    rows = [
        replace(row, label=label, missing_kv=kv, **ratios)
        for kv in ("recompute", "propagate")
        for label in labels
    ]
    rows = corrected(rows, study)
    for row in rows:
        base, shown = row.label == "base", row.label == "shown"
        assert row.to_static.p_holm == (None if shown else pytest.approx(0.03))
        assert row.p_value == row.to_static.p_holm
        expected = None if base or shown else pytest.approx(0.02)
        assert row.to_baseline.p_holm == row.final_to_baseline.p_holm == expected
