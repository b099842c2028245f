import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from offramp.calibration.budget import keep_budget
from offramp.errors import ConfigError
from offramp.evaluation.cost import ModelCost
from offramp.evaluation.sweep import sweep


def cost_of(exit_layers, *, layer=10.0, head=0.0):
    return ModelCost(
        exit_layers=exit_layers,
        context=1.0,
        layers=(layer,) * exit_layers[-1],
        heads=dict.fromkeys(exit_layers, head),
    )


@pytest.mark.parametrize("budget", [50.0, 62.5, 80.0, 99.0, 100.0, 150.0])
@pytest.mark.parametrize("head", [0.0, 3.0])
def test_one_exit_is_solved_exactly(make_trace, budget, head):
    trace = make_trace(20)
    cost = cost_of((1, 2), head=head)
    scores = sorted(set(trace.scores("max_prob")[0].tolist()))
    every = sweep(trace, [-math.inf, *scores, math.inf], cost=cost)
    affordable = [row for row in every if row.flops_pct <= budget + 1e-9]
    if not affordable:
        with pytest.raises(ConfigError, match=r"compute_budget: expected at least 56\.52%"):
            keep_budget(trace, budget, cost=cost)
        return
    found = keep_budget(trace, budget, cost=cost)
    assert found.ppl == pytest.approx(min(row.ppl for row in affordable), rel=1e-12)
    assert found.flops_pct <= budget + 1e-9


@pytest.mark.parametrize("head", [0.0, 6.0])
@pytest.mark.parametrize("budget", [45.0, 60.0, 75.0, 90.0])
def test_two_exits_do_as_well_as_a_grid_of_all_pairs(make_trace, budget, head):
    trace = make_trace(60, exit_layers=(1, 2, 4))
    cost = cost_of((1, 2, 4), head=head)
    levels = [-math.inf, *np.quantile(trace.scores("max_prob")[:-1], np.linspace(0, 1, 26))]
    levels = [float(level) for level in levels] + [math.inf]
    grid = sweep(trace, itertools.product(levels, levels), cost=cost)
    best = min(row.ppl for row in grid if row.flops_pct <= budget)
    found = keep_budget(trace, budget, cost=cost)
    assert found.flops_pct <= budget + 1e-9
    assert found.ppl <= best * 1.002


def test_tokens_with_equal_scores_leave_together(make_trace):
    trace = make_trace(50)
    rounded = np.round(trace.scores("max_prob") * 4) / 4
    trace = replace(trace, confidence={"max_prob": rounded.astype(np.float32)})
    found = keep_budget(trace, 80.0, cost=cost_of((1, 2)))
    [again] = sweep(trace, [found.threshold], cost=cost_of((1, 2)))
    assert again == found
    assert found.flops_pct <= 80


def test_an_exit_whose_head_costs_more_than_it_saves_is_not_asked(make_trace):
    """A head of 8 layers: asking at both exits is worse than at the second alone."""
    trace = make_trace(100, exit_layers=(1, 2, 12))
    found = keep_budget(trace, 60.0, cost=cost_of((1, 2, 12), layer=1.0, head=8.0))
    assert math.inf in found.threshold
    assert found.flops_pct <= 60


def test_the_whole_model_is_affordable_at_100(make_trace):
    trace = make_trace(20)
    trace.nll[0] = trace.nll[1] + 1.0  # leaving never pays
    found = keep_budget(trace, 100.0, cost=cost_of((1, 2)))
    assert found.threshold == (math.inf,)
    assert found.shallow_pct == 0


def test_a_model_without_early_exits_keeps_a_budget_of_100(make_trace):
    trace = make_trace(20).at((2,))
    cost = cost_of((2,))
    assert keep_budget(trace, 100.0, cost=cost).threshold == ()
    with pytest.raises(ConfigError, match=r"at least 100\.00%"):
        keep_budget(trace, 99.0, cost=cost)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan])
def test_a_budget_that_no_exit_keeps_is_a_config_error(make_trace, budget):
    with pytest.raises(ConfigError, match="compute_budget"):
        keep_budget(make_trace(20), budget, cost=cost_of((1, 2)))


@pytest.mark.parametrize(("complete_from", "least"), [(1, 60.0), (None, 50.0)])
def test_the_projection_of_shared_keys_and_values_counts(make_trace, complete_from, least):
    """Every token pays for it, also one that leaves just below it."""
    cost = replace(cost_of((1, 2)), keys_values=(2.0, 2.0), complete_from=complete_from)
    assert keep_budget(make_trace(20), least, cost=cost).flops_pct == pytest.approx(least)
    with pytest.raises(ConfigError, match=rf"compute_budget: expected at least {least:.2f}%"):
        keep_budget(make_trace(20), least - 1, cost=cost)
