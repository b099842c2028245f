"""Sweeps against figures worked out by hand, and against their definition on random traces."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import ConfigError
from offramp.evaluation.cost import ModelCost
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import ExitTrace
from offramp.exits.policy import Decay


def make_trace(probabilities, scores, *, exit_layers=(1, 3), num_layers=3):
    """A trace from each exit's probability of the target and its max_prob."""
    nll = -np.log(np.array(probabilities))
    return ExitTrace(
        num_layers=num_layers,
        exit_layers=exit_layers,
        targets=np.arange(nll.shape[1], dtype=np.int64),
        nll=nll.astype(np.float32),
        argmax=np.tile(np.arange(nll.shape[0], dtype=np.int64)[:, None], nll.shape[1]),
        confidence={"max_prob": np.array(scores, dtype=np.float32)},
    )


@pytest.fixture
def three_tokens():
    return make_trace(
        [[1 / 2, 1 / 4, 1 / 8], [1 / 4, 1 / 2, 1 / 2]], [[0.9, 0.4, 0.95], [0.1, 0.1, 0.1]]
    )


@pytest.mark.parametrize(
    ("threshold", "exponent", "shallow_pct", "compute_pct"),
    [
        # PPL is 2 to the mean of -log2 p over the exits taken
        (0.0, (1 + 2 + 3) / 3, 100, 100 / 3),
        (0.4, (1 + 2 + 3) / 3, 100, 100 / 3),
        (0.5, (1 + 1 + 3) / 3, 200 / 3, 500 / 9),
        (0.9, (1 + 1 + 3) / 3, 200 / 3, 500 / 9),
        (0.95, (2 + 1 + 3) / 3, 100 / 3, 700 / 9),
        (1.01, (2 + 1 + 1) / 3, 0, 100),
        (math.inf, (2 + 1 + 1) / 3, 0, 100),
        (-math.inf, (1 + 2 + 3) / 3, 100, 100 / 3),
    ],
)
def test_three_tokens_by_hand(three_tokens, threshold, exponent, shallow_pct, compute_pct):
    [row] = sweep(three_tokens, [threshold])
    assert row.threshold == threshold
    assert row.ppl == pytest.approx(2**exponent)
    assert row.shallow_pct == pytest.approx(shallow_pct)
    assert row.compute_pct == pytest.approx(compute_pct)
    assert row.exit_share == pytest.approx({1: shallow_pct / 100, 3: 1 - shallow_pct / 100})


def test_perplexity_at_each_exit_by_hand(three_tokens):
    assert three_tokens.ppl(1) == pytest.approx(4)
    assert three_tokens.ppl(3) == pytest.approx(2 ** (4 / 3))
    assert three_tokens.num_tokens == 3


def test_a_row_for_each_threshold_in_their_order(three_tokens):
    assert [row.threshold for row in sweep(three_tokens, [0.9, 0.1, 0.5])] == [0.9, 0.1, 0.5]


def test_three_exits_by_hand():
    trace = make_trace(
        [[1 / 2, 1 / 2], [1 / 4, 1 / 8], [1, 1]],
        [[0.3, 0.6], [0.8, 0.9], [1, 1]],
        exit_layers=(1, 3, 4),
        num_layers=4,
    )
    [row] = sweep(trace, [(0.5, 0.7)])  # token 0 leaves at layer 3, token 1 at layer 1
    assert row.threshold == (0.5, 0.7)
    assert row.ppl == pytest.approx(2**1.5)
    assert row.exit_share == {1: 0.5, 3: 0.5, 4: 0.0}
    assert row.shallow_pct == 100
    assert row.compute_pct == pytest.approx(50)
    with pytest.raises(ConfigError, match="expected 2"):
        sweep(trace, [(0.5,)])


def test_fewer_exits_see_the_same_tokens():
    trace = make_trace(
        [[1 / 2, 1 / 2], [1 / 4, 1 / 8], [1, 1]],
        [[0.3, 0.6], [0.8, 0.9], [1, 1]],
        exit_layers=(1, 3, 4),
        num_layers=4,
    )
    fewer = trace.at((3, 4))
    assert (fewer.exit_layers, fewer.num_layers) == ((3, 4), 4)
    assert fewer.targets.tolist() == [0, 1]
    assert fewer.nll.tolist() == trace.nll[1:].tolist()
    assert fewer.argmax.tolist() == [[1, 1], [2, 2]]
    assert fewer.confidence["max_prob"].tolist() == trace.confidence["max_prob"][1:].tolist()
    [row] = sweep(fewer, [0.85])
    assert row.exit_share == {3: 0.5, 4: 0.5}
    assert row.compute_pct == pytest.approx(87.5)
    [row] = sweep(trace.at((1, 4)), [0.5])
    assert row.exit_share == {1: 0.5, 4: 0.5}


def test_a_layer_that_the_trace_lacks_is_a_config_error(three_tokens):
    with pytest.raises(ConfigError, match="got 2"):
        three_tokens.at((2, 3))
    with pytest.raises(ConfigError, match="got 2"):
        three_tokens.ppl(2)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50), st.floats(-0.5, 1.5))
def test_compute_follows_from_shallow_with_exit_1_of_3_layers(scores, threshold):
    n = len(scores)
    trace = make_trace([[0.5] * n, [0.25] * n], [scores, [1.0] * n])
    [row] = sweep(trace, [threshold])
    assert row.compute_pct == pytest.approx(100 - row.shallow_pct * 2 / 3)
    left = sum(bool(np.float32(score) >= np.float32(threshold)) for score in scores)
    assert row.shallow_pct == pytest.approx(100 * left / n)
    assert row.ppl == pytest.approx(2 ** ((left + 2 * (n - left)) / n), rel=1e-5)
    assert sum(row.exit_share.values()) == pytest.approx(1)


def long_trace(shallow, deep):
    """A trace of 3,000,000 tokens, each with the same NLL at an exit, all sure of themselves."""
    tokens = 3_000_000
    nll = np.stack([np.full(tokens, value, dtype=np.float32) for value in (shallow, deep)])
    return ExitTrace(
        num_layers=2,
        exit_layers=(1, 2),
        targets=np.zeros(tokens, dtype=np.int64),
        nll=nll,
        argmax=np.zeros((2, tokens), dtype=np.int64),
        confidence={"max_prob": np.full((2, tokens), 0.5, dtype=np.float32)},
    )


def test_perplexity_sums_in_float64():
    """In float32 a long sum of small numbers loses its tail."""
    trace = long_trace(0.1, 0.3)
    expected = math.exp(float(np.float32(0.1)))
    assert trace.ppl(1) == pytest.approx(expected, rel=1e-12)
    assert sweep(trace, [0.5])[0].ppl == pytest.approx(expected, rel=1e-12)


def test_an_exit_that_diverged_spoils_only_the_thresholds_that_use_it():
    trace = long_trace(math.inf, 0.0)
    taken, avoided = sweep(trace, [0.5, 0.6])
    assert (taken.ppl, avoided.ppl) == (math.inf, 1.0)
    assert trace.ppl(1) == math.inf


COST = ModelCost(
    exit_layers=(1, 3),
    context=1.0,
    layers=(20.0, 20.0, 20.0),
    heads={1: 40.0, 3: 40.0},
    gates={"gain": {1: 10.0}},
)


@pytest.mark.parametrize(
    ("threshold", "flops_pct"),
    [
        (0.5, (60 + 140 + 60) / 3),  # token 1 pays for both heads
        (1.01, 140),
        (math.inf, 100),  # nobody asks
        (-math.inf, 60),
        (0.0, 60),
    ],
)
def test_the_flops_of_a_threshold_count_heads(three_tokens, threshold, flops_pct):
    [row] = sweep(three_tokens, [threshold], cost=COST)
    assert row.flops_pct == pytest.approx(flops_pct)
    assert sweep(three_tokens, [threshold])[0].flops_pct is None


def test_a_decay_reads_the_positions_of_the_trace(three_tokens):
    trace = replace(three_tokens, position=np.array([0, 1, 2], dtype=np.int32))
    decay = Decay(tau=100.0, length=2)  # 0.9 x 0.95 = 0.855, and 0.1 more at the first position
    assert sweep(trace, [0.95], decay=decay)[0].exit_share == pytest.approx({1: 1 / 3, 3: 2 / 3})
    late = replace(trace, position=np.array([1, 1, 2], dtype=np.int32))
    assert sweep(late, [0.95], decay=decay)[0].exit_share == pytest.approx({1: 2 / 3, 3: 1 / 3})


def test_a_measure_that_was_not_recorded_is_a_config_error(three_tokens):
    with pytest.raises(ConfigError, match=r"a measure of the trace \(max_prob\), got 'gain'"):
        sweep(three_tokens, [0.5], confidence="gain")
