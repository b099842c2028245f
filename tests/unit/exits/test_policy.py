import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import ConfigError
from offramp.exits.policy import Decay, GainPolicy, ThresholdPolicy


def routed(policy, scores, positions=None):
    """The index of the exit where each token leaves; scores are (exits - 1, tokens)."""
    return policy.leaving(np.asarray(scores, dtype=np.float32), positions).argmax(axis=0).tolist()


def route(threshold, *scores):
    """Where tokens leave; one list of scores for each exit but the last."""
    return routed(ThresholdPolicy.of(threshold, len(scores) + 1), scores)


SCORES = [0.01, 0.3, 0.7, 0.95, 1.0]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.0, [0, 0, 0, 0, 0]),
        (-math.inf, [0, 0, 0, 0, 0]),
        (0.5, [1, 1, 0, 0, 0]),
        (1.0, [1, 1, 1, 1, 0]),
        (1.0 + 1e-9, [1, 1, 1, 1, 1]),  # above 1, though 1 in float32
        (1.001, [1, 1, 1, 1, 1]),
        (2.0, [1, 1, 1, 1, 1]),
        (1e300, [1, 1, 1, 1, 1]),
        (-1e300, [0, 0, 0, 0, 0]),
        (math.inf, [1, 1, 1, 1, 1]),
    ],
)
def test_one_threshold(threshold, expected):
    assert route(threshold, SCORES) == expected


@pytest.mark.parametrize("threshold", [0.95, 0.7, 0.9, 0.1, 0.3, 1 / 3])
def test_a_score_equal_to_the_threshold_as_written_leaves(threshold):
    """float32(0.95) and float32(0.7) are below the float64 of the same name."""
    score = np.float32(threshold)
    below = np.nextafter(score, np.float32(0))
    assert route(threshold, [score, below]) == [0, 1]


def test_infinite_scores_obey_infinite_thresholds():
    assert route(-math.inf, [-math.inf]) == [0]
    assert route(math.inf, [3e38]) == [1]


def test_the_first_exit_that_is_sure_takes_the_token():
    first = [0.9, 0.1, 0.9, 0.1]
    second = [0.9, 0.9, 0.1, 0.1]
    assert route(0.5, first, second) == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        ((0.5, 0.8), [0, 1, 2]),
        ((0.7, 0.6), [1, 1, 1]),
        ((2.0, 0.0), [1, 1, 1]),
        ((math.inf, math.inf), [2, 2, 2]),
        ((math.inf, -math.inf), [1, 1, 1]),
        ([0.6, 2.0], [0, 2, 2]),
    ],
)
def test_three_exits_have_thresholds_of_their_own(thresholds, expected):
    assert route(thresholds, [0.6, 0.4, 0.1], [0.9, 0.8, 0.7]) == expected


def test_with_one_exit_all_tokens_go_to_it():
    policy = ThresholdPolicy.of(0.5, 1)
    assert routed(policy, np.zeros((0, 3))) == [0, 0, 0]


@pytest.mark.parametrize("thresholds", [(), (0.5,), (0.5, 0.5, 0.5)])
def test_a_wrong_number_of_thresholds_is_a_config_error(thresholds):
    with pytest.raises(ConfigError, match=f"expected 2, .* got {len(thresholds)}"):
        ThresholdPolicy.of(thresholds, 3)


@pytest.mark.parametrize("threshold", [math.nan, (0.5, math.nan)])
def test_a_nan_threshold_is_a_config_error(threshold):
    with pytest.raises(ConfigError, match="got nan"):
        ThresholdPolicy.of(threshold, 3)


@given(
    st.lists(
        st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)), min_size=1, max_size=20
    ),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_higher_threshold_never_lets_a_token_leave_earlier(scores, a, b):
    columns = [list(column) for column in zip(*scores, strict=True)]
    low, high = sorted((a, b))
    for earlier, later in zip(route(low, *columns), route(high, *columns), strict=True):
        assert earlier <= later


POSITIONS = np.array([0, 10, 50, 100])


def test_a_decaying_threshold_is_calms():
    decay = Decay(tau=4.0, length=100)
    expected = [0.9 * 0.7 + 0.1 * math.exp(-4 * t / 100) for t in (0, 10, 50, 100)]
    assert decay.threshold(0.7, POSITIONS).tolist() == pytest.approx(expected, rel=1e-15)
    assert decay.threshold(1.0, POSITIONS).max() == 1.0
    assert decay.threshold(0.0, POSITIONS).tolist() == pytest.approx(
        [0.1 * math.exp(-4 * t / 100) for t in (0, 10, 50, 100)]
    )


@pytest.mark.parametrize("threshold", [math.inf, -math.inf, 1.01, 2.0, -0.05])
def test_a_threshold_that_means_never_or_always_passes_any_decay(threshold):
    assert (Decay(tau=4.0, length=100).threshold(threshold, POSITIONS) == threshold).all()


def test_a_score_that_is_enough_late_is_not_enough_early():
    """At 0.7 and tau 4: 0.73 at first, and 0.6318 at the end."""
    policy = ThresholdPolicy.of((0.7, 0.7), 3, decay=Decay(tau=4.0, length=100))
    scores = np.tile(np.array([0.7, 0.7, 0.7, 0.6], dtype=np.float32), (2, 1))
    positions = np.array([0, 99, 99, 99])
    assert routed(policy, scores, positions) == [2, 0, 0, 2]
    assert routed(policy, scores, np.zeros(4, dtype=int)) == [2, 2, 2, 2]


def test_a_decay_without_positions_is_a_config_error():
    policy = ThresholdPolicy.of(0.5, 2, decay=Decay(tau=1.0, length=10))
    with pytest.raises(ConfigError, match="positions"):
        policy.leaving(np.zeros((1, 3), dtype=np.float32))
    with pytest.raises(ConfigError, match="positions"):
        policy.leaves(0, torch.zeros(3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tau": -1.0, "length": 5}, "decay: expected .* got -1"),
        ({"tau": math.nan, "length": 5}, "decay: expected .* got nan"),
        ({"tau": 1.0, "length": 0}, "length: expected at least 1, got 0"),
    ],
)
def test_a_decay_out_of_range_is_a_config_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        Decay(**fields)


@pytest.mark.parametrize("decay", [None, Decay(tau=2.0, length=40)])
@pytest.mark.parametrize("thresholds", [(0.5, 0.7), (math.inf, -math.inf), (1.0, 0.3), (1.1, 0.0)])
def test_exit_by_exit_on_tensors_equals_all_exits_on_arrays(thresholds, decay):
    """As a decoder asks: only those that stayed come to the next exit."""
    random = np.random.default_rng(0)
    scores = random.random((2, 200)).astype(np.float32)
    scores[:, :10] = np.float32(0.7)
    scores[:, 10:20] = 1.0
    positions = random.integers(0, 40, 200)
    policy = ThresholdPolicy.of(thresholds, 3, decay=decay)
    taken = torch.full((200,), 2)
    staying = torch.arange(200)
    for index in range(2):
        at = torch.from_numpy(positions)[staying]
        leaving = policy.leaves(index, torch.from_numpy(scores)[index, staying], at)
        taken[staying[leaving]] = index
        staying = staying[~leaving]
    assert taken.tolist() == routed(policy, scores, positions)


def gain_route(price, costs, *expected):
    """Where tokens leave; one list of (K, tokens) for each exit but the last."""
    policy = GainPolicy(price=price, costs=costs)
    arrays = [np.array(losses, dtype=np.float32) for losses in expected]
    return policy.leaving(arrays).argmax(axis=0).tolist()


def test_with_one_early_exit_the_price_is_a_threshold_on_the_gain():
    """Leaving saves 60 units at 0.002 nats: whoever loses at most 0.12 leaves."""
    assert gain_route(0.002, (40.0, 100.0), [[0.05, 0.1199, 0.1201, 0.5]]) == [0, 0, 1, 1]


def test_two_early_exits_by_hand():
    """Going on to 60 costs 0.1 nats, from 60 to 100 another 0.2."""
    policy = GainPolicy(price=0.005, costs=(40.0, 60.0, 100.0))
    first = np.array(
        [
            [0.05, 0.30, 0.30, 0.50, 0.31],  # here
            [0.00, 0.10, 0.25, 0.40, 0.25],  # at the next exit
        ]
    )
    # here, next + 0.1, last + 0.3: .05|.10|.30  .30|.20|.30  .30|.35|.30  .50|.50|.30  .31|.35|.30
    second = np.array([[0.0, 0.1, 0.9, 0.19, 0.21]])
    advantage = policy.advantage(0, first)
    assert advantage.tolist() == pytest.approx([-0.05, 0.10, 0.0, 0.20, 0.01])
    first[0, 2] = 0.29
    assert gain_route(0.005, (40.0, 60.0, 100.0), first, second) == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(("price", "taken"), [(0.0, 2), (1e9, 0)])
def test_free_cost_takes_all_to_the_end_and_a_dear_one_none(price, taken):
    expected = np.random.default_rng(0).random((2, 50)) + 0.01
    assert set(gain_route(price, (40.0, 60.0, 100.0), expected, expected[:1])) == {taken}


def test_the_gain_policy_on_tensors_equals_arrays():
    random = np.random.default_rng(0)
    expected = [random.random((k, 100)).astype(np.float32) for k in (2, 1)]
    policy = GainPolicy(price=0.01, costs=(40.0, 60.0, 100.0))
    leaving = policy.leaving(expected)
    first = policy.leaves(0, torch.from_numpy(expected[0]).T)
    second = policy.leaves(1, torch.from_numpy(expected[1]).T)
    assert first.tolist() == leaving[0].tolist()
    assert (second & ~first).tolist() == leaving[1].tolist()
    assert 0 < leaving[0].sum() < 100


@pytest.mark.parametrize("price", [-0.1, math.nan])
def test_a_price_below_zero_is_a_config_error(price):
    with pytest.raises(ConfigError, match="price"):
        GainPolicy(price=price, costs=(1.0, 2.0))


@pytest.mark.parametrize(
    ("thresholds", "used"),
    [
        ((0.5, 0.9), (1, 3)),
        ((math.inf, 0.9), (3,)),
        ((-math.inf, math.inf), (1,)),
        ((math.inf, math.inf), ()),
    ],
)
def test_an_exit_with_an_infinite_threshold_is_not_used(thresholds, used):
    assert ThresholdPolicy.of(thresholds, 3).used((1, 3, 6)) == used
    assert ThresholdPolicy.of(0.5, 3, decay=Decay(tau=1.0, length=4)).used((1, 3, 6)) == (1, 3)


def test_a_decay_beyond_all_numbers_leaves_the_last_threshold():
    """No warning: warnings are errors here."""
    found = Decay(tau=1e308, length=4).threshold(0.5, np.arange(40))
    assert found.tolist() == [pytest.approx(0.55)] + [0.45] * 39
