"""Betting and empirical Bernstein: by hand, at the edges, and against Hoeffding-Bentkus."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from offramp.calibration.bets import BOLDEST, fixed_bets
from offramp.calibration.bounds import betting, empirical_bernstein, hoeffding_bentkus, p_values
from offramp.calibration.promise import Promise, choose_test, sequences_needed
from offramp.errors import ConfigError

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "certificate_bounds.py"
TESTS = ("hoeffding-bentkus", "betting", "empirical-bernstein")
SHARES = [("shares, mean 0.01, sd 0.01"), ("shares, mean 0.01, sd 0.03")]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("certificate_bounds", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def columns(losses):
    return np.asarray(losses, dtype=np.float64)[:, None]


def test_betting_by_hand():
    losses, epsilon = [0.0, 0.3, 1.0], 0.2
    wealth = sum(
        weight * math.prod(1 + fraction / 0.8 * (0.2 - loss) for loss in losses)
        for fraction, weight in fixed_bets(epsilon, 3, 0.05)
    )
    assert betting(columns([0.0] * 40), epsilon, delta=0.05) < 0.001
    assert betting(columns(losses), epsilon, delta=0.05) == pytest.approx(min(1.0, 1 / wealth))


def test_empirical_bernstein_by_hand():
    losses, centres, epsilon = [0.1, 0.0, 0.02] * 20, [], 0.3
    for i in range(60):
        centres.append(sum(losses[:i]) / (i + 1))
    variation = sum((loss - centre) ** 2 for loss, centre in zip(losses, centres, strict=True))
    total = sum(epsilon - loss for loss in losses)
    wealth = sum(
        weight * math.exp(bet * total + (math.log(1 - bet) + bet) * variation)
        for bet, weight in fixed_bets(epsilon, 60, 0.05)
    )
    assert wealth > 1
    found = empirical_bernstein(columns(losses), epsilon, delta=0.05)
    assert found == pytest.approx(1 / wealth)


@pytest.mark.parametrize("epsilon", [1e-9, 0.01, 0.5, 0.999999])
@pytest.mark.parametrize("delta", [1e-12, 0.05, 0.9])
@pytest.mark.parametrize("n", [1, 59, 10**6])
def test_bets_are_weights_and_stay_below_the_largest(epsilon, delta, n):
    fractions, weights = zip(*fixed_bets(epsilon, n, delta), strict=True)
    assert sum(weights) == pytest.approx(1.0)
    assert all(0 <= fraction <= BOLDEST for fraction in fractions)
    assert min(weights) > 0


@pytest.mark.parametrize("n", [80, 200, 1000])
def test_the_bet_for_binary_losses_certifies_wherever_hoeffding_does(n):
    """log(1 + l (eps - x)) is concave in x, so shares are never worse than 0/1 losses."""
    epsilon, delta = 0.05, 0.05
    bet = fixed_bets(epsilon, n, delta)[1][0] / (1 - epsilon)
    for lost in range(int(n * epsilon)):
        mean = lost / n
        growth = mean * math.log1p(bet * (epsilon - 1)) + (1 - mean) * math.log1p(bet * epsilon)
        kl = (mean * math.log(mean / epsilon) if mean else 0) + (1 - mean) * math.log(
            (1 - mean) / (1 - epsilon)
        )
        if bet < BOLDEST / (1 - epsilon) and n * kl >= math.log(1 / delta):
            assert n * growth >= math.log(1 / delta) - 1e-9


@pytest.mark.parametrize("test", TESTS[1:])
@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.1, 0.05), (0.05, 0.05), (0.01, 0.05), (0.3, 1e-9), (0.9, 0.5)]
)
def test_the_fewest_sequences_that_certify_anything(test, epsilon, delta):
    n = sequences_needed(epsilon, delta, test=test)
    below = 1.0 if n == 1 else p_values(np.zeros((n - 1, 1)), epsilon, delta=delta, test=test)
    assert p_values(np.zeros((n, 1)), epsilon, delta=delta, test=test) <= delta < below
    if delta == 0.05:
        assert sequences_needed(epsilon, delta) < n < 1.3 * sequences_needed(epsilon, delta)


@pytest.mark.parametrize("epsilon", [1e-9, 1e-4])
def test_many_needed_sequences_are_counted_at_once(epsilon):
    assert 3 / epsilon < sequences_needed(epsilon, 0.05, test="betting") < 3.5 / epsilon


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("losses", [[1.0] * 50, [1.0], [0.0], [0.5] * 500])
def test_a_risk_above_epsilon_and_one_sequence_certify_nothing(test, losses):
    [found] = p_values(columns(losses), 0.05, delta=0.05, test=test)
    assert 0.9 < found <= 1.0


@pytest.mark.parametrize("test", TESTS)
def test_p_values_have_any_leading_shape_and_stay_numbers_at_extremes(test):
    random = np.random.default_rng(0)
    losses = random.random((3, 20, 4))
    found = p_values(losses, 0.9, delta=0.05, test=test)
    assert found.shape == (3, 4)
    for index in np.ndindex(3, 4):
        one = losses[index[0], :, index[1], None]
        assert p_values(one, 0.9, delta=0.05, test=test) == pytest.approx(found[index])
    for epsilon in (1e-12, 1 - 1e-9):
        for value in (0.0, 1.0):
            with np.errstate(all="raise", under="ignore"):
                [found] = p_values(np.full((5000, 1), value), epsilon, delta=1e-30, test=test)
            assert 0 <= found <= 1


def test_betting_does_not_depend_on_the_order():
    losses = np.random.default_rng(0).beta(0.1, 5, (100, 1))
    turned = betting(losses[::-1], 0.05, delta=0.05)
    assert turned == pytest.approx(betting(losses, 0.05, delta=0.05))


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_losses_outside_0_and_1_are_a_config_error(test, wrong):
    with pytest.raises(ConfigError, match=f"losses: expected numbers from 0 to 1, got {wrong}"):
        p_values(columns([0.0, wrong]), 0.1, delta=0.05, test=test)


def test_a_test_that_is_none_is_a_config_error():
    with pytest.raises(ConfigError, match=r"test: expected one of betting, .* got 'bonferroni'"):
        p_values(columns([0.0]), 0.1, delta=0.05, test="bonferroni")
    with pytest.raises(ConfigError, match=r"test: expected one of auto, .* got 'x'"):
        Promise(test="x")
    with pytest.raises(ConfigError, match="test: expected none with crc"):
        Promise(method="crc", test="betting")


def test_auto_chooses_by_the_number_of_sequences_alone():
    needed = sequences_needed(0.05, 0.05, test="betting")
    assert choose_test(needed, 0.05, 0.05) == "betting"
    assert choose_test(needed - 1, 0.05, 0.05) == "hoeffding-bentkus"
    assert Promise(epsilon=0.05).test_for(needed) == "betting"
    chosen = Promise(epsilon=0.05, test="empirical-bernstein")
    assert chosen.test_for(10) == "empirical-bernstein"
    assert chosen.sequences_needed > needed > Promise(epsilon=0.05).sequences_needed == 59


@pytest.mark.parametrize("power", [0.5, 0.9])
@pytest.mark.parametrize("name", SHARES)
def test_betting_needs_at_most_seven_tenths_of_the_sequences(benchmark, name, power):
    """Mean risk 0.01, epsilon 0.05, shares with a standard deviation of up to 0.03."""
    needed = [
        benchmark.fewest(test, benchmark.LOSSES[name], epsilon=0.05, power=power, draws=300)
        for test in TESTS[:2]
    ]
    assert needed[1] <= 0.7 * needed[0], needed


def test_for_binary_losses_hoeffding_bentkus_is_better(benchmark):
    """So auto uses it where losses are known to be 0 or 1."""
    draw = benchmark.LOSSES["0 or 1, mean 0.01, sd 0.10"]
    needed = [benchmark.fewest(test, draw, epsilon=0.05, draws=300) for test in TESTS[:2]]
    assert needed[0] < needed[1]


def test_betting_beats_hoeffding_bentkus_by_orders_where_losses_hardly_vary():
    losses = np.full((400, 1), 0.02)
    assert betting(losses, 0.05, delta=0.05) < 0.1 * hoeffding_bentkus(0.02, 400, 0.05)
