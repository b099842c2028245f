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
BOTH = ("recompute", "propagate")


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


def done(label, layers, seed, *, flops, full, routed=None, source=None, kvs=BOTH):
    """A run: costs and PPLs in percent of its own full model."""
    frontiers = {full_depth("test"): frontier([100.0], [full])}
    if routed:
        frontiers |= {
            FrontierKey(text="test", confidence="gain", missing_kv=kv): frontier(*routed)
            for kv in kvs
        }
    exits = {1: routed[1][0], layers: full} if routed else {layers: full}
    model = SimpleNamespace(num_hidden_layers=layers, exit_layers=tuple(exits))
    training = SimpleNamespace(loss_weights="", seed=seed)
    run = SimpleNamespace(
        label=label, name="", model=model, training=training, measures=("gain",), conventions=kvs
    )
    record = SimpleNamespace(full_flops=flops, exit_ppl=exits, config={})
    return SimpleNamespace(
        run=run, seed=seed, layers=layers, source=source, record=record, frontiers=frontiers
    )


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


def test_static_models_that_share_keys_and_values_count_where_they_are_better():
    """Plain ones of 1, 2 and 3 layers cost 25, 50 and 100%; one of 3 that shares costs 80%."""
    static = [
        done("", layers, 0, flops=flops, full=ppl, source=source)
        for layers, flops, ppl, source in (
            (1, 2.5, 16.0, None),
            (2, 5.0, 8.0, None),
            (3, 10.0, 4.0, None),
            (3, 8.0, 3.0, 1),
        )
    ]
    comparison = Comparison(static=static, seeds=(0,), depth=3, compared_at=65.0)

    def at(point):
        ((nll, draws),) = comparison.static_curves.at_cost(point)
        assert draws == pytest.approx(np.full(1000, nll))
        return float(np.exp(nll))

    assert at(30) == pytest.approx(16 ** (1 - 0.2) * 8**0.2)  # both kinds have these
    assert at(65) == pytest.approx(8**0.5 * 3**0.5)  # a plain one has 8 ** 0.7 * 4 ** 0.3
    assert at(80) == at(90) == at(100) == pytest.approx(3.0)  # no need to spend more
    ((standard, _),) = comparison.static_curves.standard
    assert float(np.exp(standard)) == pytest.approx(4.0)
    assert comparison.static_model(static[3]).source == 1
    assert comparison.static_model(static[3]).flops_pct == pytest.approx(80.0)
    plain = Comparison(static=static[:3], seeds=(0,), depth=3, compared_at=65.0)
    assert comparison.static_curves.areas[0][0] < plain.static_curves.areas[0][0]


def test_costs_of_a_cheaper_model_are_shares_of_the_standard_models(comparison):
    """Its own full model costs 90% of it, and counts at 100% as well."""
    own = [
        done(
            "ours",
            2,
            seed,
            flops=9.0,
            full=3.6,
            source=1,
            kvs=("exact",),
            routed=([50.0, 100.0], [6.0, 3.6]),
        )
        for seed in SEEDS
    ]
    row = comparison.row(own, "gain", "exact", None)
    at_60 = (60 - 45) / (90 - 45)
    assert row.ppl_at[60].mean == pytest.approx(6.0 ** (1 - at_60) * 3.6**at_60)
    assert row.ppl_at[100].mean == pytest.approx(3.6)
    assert row.ratio_to_standard_at[60].mean == pytest.approx(row.ppl_at[60].mean / 4)
    curve = comparison.routed_model(own[0]).curve("gain", "propagate")
    assert curve.flops_pct == pytest.approx([45.0, 90.0])


def test_an_exact_recipe_is_compared_with_what_a_baseline_does_when_it_decodes(comparison):
    exact = [replace_kvs(entry, ("exact",)) for entry in recipe("ours", (1.0, 1.0))]
    base = recipe("base", (2.0, 2.0))
    propagate = FrontierKey(text="test", confidence="gain", missing_kv="propagate")
    for entry in base:
        entry.frontiers[propagate] = frontier([50.0, 100.0], [24.0, 3.6])
    row = comparison.row(exact, "gain", "exact", base)
    assert row.to_baseline.values == pytest.approx([(6 / 24) ** 0.8] * 2)
    row = comparison.row(base, "gain", "recompute", exact)
    assert row.to_baseline.values == pytest.approx([2**0.8] * 2)


def replace_kvs(entry, kvs):
    model = entry.run.model
    routed = entry.frontiers[FrontierKey(text="test", confidence="gain", missing_kv="recompute")]
    key = FrontierKey(text="test", confidence="gain", missing_kv=kvs[0])
    frontiers = {full_depth("test"): entry.frontiers[full_depth("test")], key: routed}
    run = SimpleNamespace(**vars(entry.run) | {"conventions": kvs, "model": model})
    return SimpleNamespace(**vars(entry) | {"frontiers": frontiers, "run": run})


def test_exact_rows_and_those_under_propagate_are_one_family(comparison):
    study = replace(STUDIES["heads"], baseline=None, recipes=(Recipe(label="a"), Recipe(label="b")))
    row = comparison.row(recipe("a", (1.0, 1.1)), "gain", "recompute", None)
    tested = {"to_static": replace(row.to_static, p_value=0.01)}
    rows = [
        replace(row, label=label, missing_kv=kv, **tested)
        for label, kv in (("a", "exact"), ("b", "propagate"), ("b", "recompute"))
    ]
    assert [row.p_value for row in corrected(rows, study)] == pytest.approx([0.02, 0.02, 0.01])


def test_costs_are_in_percent_of_the_standard_model_though_another_costs_more():
    """Wider blocks above a source may cost a little more than what they save."""
    static = [
        done("", layers, 0, flops=flops, full=ppl, source=source)
        for layers, flops, ppl, source in (
            (2, 5.0, 8.0, None),
            (3, 10.0, 4.0, None),
            (3, 12.5, 3.0, 1),
        )
    ]
    comparison = Comparison(static=static, seeds=(0,), depth=3, compared_at=65.0)
    percent = [comparison.static_model(entry).flops_pct for entry in static]
    assert percent == pytest.approx([50.0, 100.0, 125.0])
    ((nll, _),) = comparison.static_curves.at_cost(100.0)
    between = 8 ** (1 / 3) * 3 ** (2 / 3)  # 100 between 50 and 125
    assert float(np.exp(nll)) == pytest.approx(min(4.0, between))
