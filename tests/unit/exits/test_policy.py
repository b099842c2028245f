import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import ConfigError
from offramp.exits.policy import ThresholdPolicy


def route(threshold, *scores):
    """Where tokens leave; one list of scores for each exit but the last."""
    policy = ThresholdPolicy.of(threshold, len(scores) + 1)
    return policy.route(np.array(scores, dtype=np.float32)).tolist()


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
    assert policy.route(np.zeros((0, 3), dtype=np.float32)).tolist() == [0, 0, 0]


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
