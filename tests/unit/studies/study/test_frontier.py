"""A study's frontiers: the same figures as a sweep, and honest interpolation."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offramp.data import batches
from offramp.evaluation.cost import model_cost
from offramp.evaluation.routed import RoutedTrace, collect_routed
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import collect_trace
from offramp.exits.policy import ThresholdPolicy
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.studies.study.evaluate import _policies, evaluate
from offramp.studies.study.frontier import (
    STRETCHES,
    FrontierKey,
    at,
    full_depth,
    load_frontiers,
    over,
    resampled,
    routed,
    save_frontiers,
    scaled,
)
from offramp.studies.study.plan import GateFit


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        exit_layers=(1, 3),
        exit_head="norm",
    )
    return Transformer(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 11, (331,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def evaluation(model, ids):
    texts = {"held_out": ids[:200], "test": ids}
    measures = ("max_prob", "gain")
    return evaluate(model, ids, texts, measures=measures, gates=GateFit(), seq_len=16, seed=0)


def key(confidence, missing_kv="recompute"):
    return FrontierKey(text="test", confidence=confidence, missing_kv=missing_kv)


def test_it_says_what_a_sweep_says(model, ids, evaluation):
    trace = collect_trace(model, batches(ids, seq_len=16, batch_size=32))
    frontier = evaluation.frontiers[key("max_prob")]
    cost = model_cost(model, context=8.5)
    rows = sweep(trace, frontier.thresholds.tolist(), cost=cost)
    flops, nll = frontier.curve()
    compute, _ = frontier.curve(cost="compute_pct")
    assert np.exp(nll) == pytest.approx([row.ppl for row in rows])
    assert flops == pytest.approx([row.flops_pct for row in rows])
    assert compute == pytest.approx([row.compute_pct for row in rows])
    assert frontier.tokens.sum() == trace.num_tokens


def test_propagate_differs_only_between_the_ends(evaluation):
    for measure in ("max_prob", "gain"):
        ends = [
            evaluation.frontiers[key(measure, kv)].curve()[1][[0, -1]]
            for kv in ("recompute", "propagate")
        ]
        assert ends[0] == pytest.approx(ends[1])
        inner = evaluation.frontiers[key(measure, "propagate")]
        assert inner.flops_pct[1:-1].sum() > 0


def test_a_pass_under_propagate_that_nobody_leaves_is_the_trace(model, ids):
    trace = collect_trace(model, batches(ids, seq_len=16, batch_size=8))
    for threshold, row in ((math.inf, 2), (-math.inf, 0)):
        passed = collect_routed(
            model,
            batches(ids, seq_len=16, batch_size=8),
            ThresholdPolicy(thresholds=(threshold, threshold)),
        )
        assert (passed.exits == row).all()
        assert passed.nll == pytest.approx(trace.nll[row], abs=1e-5)
        assert (passed.sequence == trace.sequence).all()


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy", "saturation", "patience"])
def test_under_propagate_the_first_exit_decides_as_in_the_trace(model, ids, measure):
    """What leaves at the first exit depends on nobody else: its states are exact."""
    windows = list(batches(ids, seq_len=16, batch_size=8))
    trace = collect_trace(model, iter(windows), measures=(measure,))
    threshold = float(np.median(trace.confidence[measure][0]))
    policy = ThresholdPolicy(thresholds=(threshold, math.inf))
    passed = collect_routed(model, iter(windows), policy, confidence=measure)
    expected = policy.leaving(trace.confidence[measure][:-1]).argmax(axis=0)
    assert ((passed.exits == 0) == (expected == 0)).all()
    left = passed.exits == 0
    assert left.sum() > 0
    assert passed.nll[left] == pytest.approx(trace.nll[0][left], abs=1e-5)
    if measure != "patience":
        assert not np.allclose(passed.nll[~left], trace.nll[2][~left], atol=1e-6)


def test_files_keep_the_frontiers(evaluation, tmp_path):
    save_frontiers(tmp_path / "frontiers.npz", evaluation.frontiers)
    loaded = load_frontiers(tmp_path / "frontiers.npz")
    assert loaded.keys() == evaluation.frontiers.keys()
    for name, frontier in loaded.items():
        assert frontier.nll == pytest.approx(evaluation.frontiers[name].nll, rel=1e-6)
        assert (frontier.tokens == evaluation.frontiers[name].tokens).all()
        assert (frontier.thresholds == evaluation.frontiers[name].thresholds).all()


def test_between_points_it_is_interpolated_and_below_them_unknown():
    x, y = np.array([40.0, 80.0, 101.0, 100.0]), np.log([16.0, 4.0, 3.5, 2.0])
    assert np.exp(at(x, y, 60)) == pytest.approx(8.0)
    assert np.exp(at(x, y, 90)) == pytest.approx(8.0**0.5)  # 101 costs more than the full model
    assert np.exp(at(x, y, 100)) == pytest.approx(2.0)
    assert math.isnan(at(x, y, 39.9))
    assert np.exp(at(x, y, 110)) == pytest.approx(2.0)  # the full model costs less than that
    assert over(x, y, np.array([40.0, 60.0, 80.0])) == pytest.approx(np.log([16.0, 8.0, 4.0]))
    both = at(np.stack([x, x]), np.stack([y, y + 1]), 60)
    assert both[1] - both[0] == pytest.approx(1.0)


def test_neighbouring_sequences_are_drawn_together(evaluation):
    number = np.repeat(np.arange(100, dtype=np.int32), 3)
    everyone = np.zeros(300, dtype=np.intp)
    trace = RoutedTrace(
        exit_layers=(2, 6), exits=everyone, nll=number.astype("f4"), sequence=number
    )
    frontier = routed([trace], [-math.inf], [(50.0, 100.0)], num_layers=6)
    assert len(frontier.tokens) == STRETCHES == 64
    assert set(frontier.tokens) == {3.0, 6.0}
    means = frontier.nll[0] / frontier.tokens
    assert (np.diff(means) > 0).all()
    assert frontier.nll.sum() == number.sum()
    assert frontier.whole().nll.tolist() == [[number.sum()]]
    for one, other in zip(frontier.whole().curve(), frontier.curve(), strict=True):
        assert one == pytest.approx(other)
    assert len(evaluation.frontiers[key("max_prob")].tokens) == 21  # one each
    assert len(evaluation.frontiers[replace(key("max_prob"), text="held_out")].tokens) == 1


def test_stretches_drawn_anew_weigh_as_often_as_they_were_drawn(evaluation):
    frontier = evaluation.frontiers[key("max_prob")]
    counts = np.zeros((2, len(frontier.tokens)))
    counts[0] = 1
    counts[1, 3] = 5
    x, y = frontier.curve(counts)
    assert y[0] == pytest.approx(frontier.curve()[1])
    assert y[1] == pytest.approx(frontier.nll[:, 3] / frontier.tokens[3])
    assert x[1] == pytest.approx(frontier.flops_pct[:, 3] / frontier.tokens[3])
    draws = resampled(np.random.default_rng(0), 21, 50)
    assert (draws.sum(axis=1) == 21).all()
    assert draws.std() > 0.5


def test_a_shallower_model_costs_its_share(evaluation):
    frontier = evaluation.frontiers[full_depth("test")]
    half = scaled(frontier, compute=0.5, flops=0.25)
    assert half.curve()[0] == pytest.approx([25.0])
    assert half.curve(cost="compute_pct")[0] == pytest.approx([50.0])
    assert replace(half, flops_pct=frontier.flops_pct).curve()[0] == pytest.approx([100.0])


def test_shares_with_equal_thresholds_keep_a_policy_each():
    """So that the n-th policies of two seeds are of one share, whatever their ties."""
    held_out = SimpleNamespace(confidence={"max_prob": [np.ones(10)]}, exit_layers=(1, 2))
    found = [
        threshold
        for threshold, _ in _policies(held_out, "max_prob", (50.0, 100.0), (0.1, 0.5, 0.9))
    ]
    assert found == [1.0] * 3
