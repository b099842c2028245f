import math

import numpy as np
import pytest
from scipy.stats import binom

from offramp.calibration.bounds import (
    conformal_steps,
    fixed_sequence,
    hoeffding_bentkus,
)
from offramp.calibration.promise import check_levels, sequences_needed
from offramp.errors import ConfigError


def h1(a, b):
    return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))


def test_p_values_by_hand():
    """n = 200, epsilon = 0.1; 5 losses: Hoeffding; 15: Bentkus, e x 0.1431, is the smaller one."""
    found = hoeffding_bentkus([5 / 200, 15 / 200], 200, 0.1)
    hoeffding = [math.exp(-200 * h1(share, 0.1)) for share in (5 / 200, 15 / 200)]
    bentkus = [
        math.e * sum(math.comb(200, k) * 0.1**k * 0.9 ** (200 - k) for k in range(losses + 1))
        for losses in (5, 15)
    ]
    assert bentkus[0] < hoeffding[0]
    assert bentkus[1] < hoeffding[1]
    assert found.tolist() == pytest.approx(bentkus)


def test_without_losses_hoeffding_is_the_smaller_one():
    assert hoeffding_bentkus(0.0, 50, 0.1) == pytest.approx(0.9**50)


def test_fractions_of_a_loss_round_up():
    found = hoeffding_bentkus(2.2 / 100, 100, 0.2)
    assert found == pytest.approx(
        min(math.exp(-100 * h1(0.022, 0.2)), math.e * binom.cdf(3, 100, 0.2))
    )


def test_a_sum_a_hair_above_a_count_is_that_count():
    mean = sum([0.1] * 30) / 100  # 3.0000000000000004 losses
    assert mean > 0.03
    assert hoeffding_bentkus(mean, 100, 0.1) == hoeffding_bentkus(0.03, 100, 0.1)


@pytest.mark.parametrize("mean", [0.1, 0.11, 0.5, 1.0])
def test_a_risk_at_epsilon_or_above_is_never_certified(mean):
    assert hoeffding_bentkus(mean, 10_000, 0.1) == 1.0


def test_p_values_rise_with_the_losses_and_fall_with_n():
    losses = hoeffding_bentkus(np.arange(0, 31) / 300, 300, 0.1)
    assert (np.diff(losses) >= 0).all()
    assert losses[0] < losses[-1] == 1.0
    assert hoeffding_bentkus(0.05, 2000, 0.1) < hoeffding_bentkus(0.05, 200, 0.1)


@pytest.mark.parametrize(("epsilon", "n"), [(0.10, 29), (0.05, 59), (0.02, 149), (0.01, 299)])
def test_the_fewest_sequences_that_certify_anything(epsilon, n):
    assert sequences_needed(epsilon, 0.05) == n
    assert hoeffding_bentkus(0.0, n, epsilon) <= 0.05 < hoeffding_bentkus(0.0, n - 1, epsilon)


@pytest.mark.parametrize(("epsilon", "n"), [(0.10, 9), (0.05, 19), (0.02, 49), (0.3, 3)])
def test_the_fewest_sequences_for_conformal_risk_control(epsilon, n):
    assert sequences_needed(epsilon, None) == n
    assert conformal_steps(np.zeros((n, 1)), epsilon) == 1
    assert conformal_steps(np.zeros((n - 1, 1)), epsilon) == 0


def test_testing_stops_at_the_first_step_that_fails():
    p_values = [[0.01, 0.05, 0.06, 0.01], [0.06, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.05]]
    assert fixed_sequence(p_values, 0.05).tolist() == [2, 0, 4]


def test_conformal_risk_control_by_hand():
    """n = 9, epsilon 0.3: a mean of at most (10 x 0.3 - 1) / 9 = 2 / 9."""
    losses = np.zeros((9, 4))
    losses[:2, 1] = 1.0
    losses[2, 2] = 1.0
    assert conformal_steps(losses[:, :2], 0.3) == 2
    losses[2, 1] = 0.01
    assert conformal_steps(losses[:, :2], 0.3) == 1
    losses[2, 1] = 0.0
    # step 2 by itself has a mean of 1 / 9; with what was lost before it, 3 / 9
    assert conformal_steps(losses, 0.3) == 2


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_levels_outside_0_and_1_are_a_config_error(value):
    with pytest.raises(ConfigError, match=f"epsilon: expected .* between 0 and 1, got {value}"):
        check_levels(delta=0.05, epsilon=value)
