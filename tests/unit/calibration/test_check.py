"""Checks of a certificate: verdicts, bounds, and looks at every sequence."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from offramp.calibration.certify import certify
from offramp.calibration.check import (
    BETS_ABOVE,
    BETS_BELOW,
    check_drift,
    p_above,
    p_below,
    risk_interval,
)
from offramp.calibration.promise import Promise
from offramp.calibration.risk import sequence_losses
from offramp.errors import ConfigError
from offramp.evaluation.cost import ModelCost
from offramp.report.confidence import drift_sentence

COST = ModelCost(exit_layers=(1, 2), context=1.0, layers=(4.0, 4.0), heads={1: 1.0, 2: 1.0})
DELTA, DRAWS = 0.05, 1000
ALLOWED = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)


def sealed(trace, promise, **chosen):
    return certify(trace, promise, model_sha256="m", corpus_sha256="c", **chosen)


@pytest.fixture
def certificate(make_trace):
    return sealed(make_trace(400), Promise(epsilon=0.05), cost=COST)


def test_new_text_of_the_same_kind_does_not_break_the_promise(certificate, make_trace):
    check = check_drift(certificate, make_trace(400, seed=1), cost=COST)
    assert check.verdict in ("holds", "undecided")
    assert check.p_broken > 0.05
    assert check.risk < 0.05
    assert check.compute_pct == pytest.approx(certificate.expected_compute_pct, abs=3)
    assert check.flops_pct is not None


def test_text_on_which_the_exits_err_more_breaks_it(certificate, make_trace):
    trace = make_trace(400, seed=1)
    left = trace.scores("max_prob")[0] >= np.float32(certificate.thresholds[0])
    trace.argmax[0, np.flatnonzero(left)[::3]] = 1
    check = check_drift(certificate, trace)
    assert check.verdict == "broken"
    assert check.p_broken < 0.01
    assert check.p_holds > 0.05
    assert check.risk > 0.05


def test_little_text_decides_nothing(certificate, make_trace):
    check = check_drift(certificate, make_trace(5, seed=1))
    assert (check.verdict, check.n) == ("undecided", 5)


def test_the_risk_of_a_drift_check_is_in_nats(make_trace):
    found = sealed(make_trace(400), Promise(risk="nll-gap", epsilon=0.05, bound=2.0))
    trace = make_trace(400, seed=1)
    losses = sequence_losses(
        trace, (found.thresholds,), confidence="max_prob", risk="nll-gap", bound=2.0
    )
    check = check_drift(found, trace)
    assert check.risk == pytest.approx(2.0 * losses.mean())
    assert check.p_holds == float(p_below(losses[:, 0], 0.025)[-1])
    assert check.risk_low < check.risk < check.risk_high
    low, high = risk_interval(losses[:, 0], 0.05)
    assert (check.risk_low, check.risk_high) == (2 * low, 2 * high)


def test_a_level_outside_0_and_1_is_a_config_error(certificate, make_trace):
    with pytest.raises(ConfigError, match="level: expected"):
        check_drift(certificate, make_trace(), level=1.0)
    with pytest.raises(ConfigError, match=r"epsilon: expected .* between 0 and 1, got 1.5"):
        check_drift(replace(certificate, epsilon=1.5), make_trace())


def test_p_values_by_hand():
    losses, risk = [0.0, 0.4, 1.0, 0.1], 0.2
    for found, bets, sign, most in (
        (p_above(losses, risk), BETS_ABOVE, 1, 1 / risk),
        (p_below(losses, risk), BETS_BELOW, -1, 1 / (1 - risk)),
    ):
        assert sum(bets.values()) == pytest.approx(1.0)
        largest = 1.0
        for n in range(1, 5):
            wealth = sum(
                weight * math.prod(1 + sign * bet * most * (x - risk) for x in losses[:n])
                for bet, weight in bets.items()
            )
            largest = max(largest, wealth)
            assert found[n - 1] == pytest.approx(1 / largest)


@pytest.mark.parametrize("kind", ["whole", "shares"])
@pytest.mark.parametrize("epsilon", [0.02, 0.2])
def test_looking_at_every_sequence_rarely_gives_a_wrong_verdict(kind, epsilon):
    """The risk is epsilon, at the edge of both hypotheses."""
    random = np.random.default_rng(0)
    draw = random.random((DRAWS, 600))
    skewed = draw ** (1 / epsilon - 1)
    losses = skewed if kind == "shares" else (draw < epsilon).astype(np.float64)
    for test in (p_above, p_below):
        found = test(losses, epsilon)
        assert (np.diff(found, axis=-1) <= 0).all()
        assert (found[:, -1] <= DELTA).mean() <= ALLOWED


def test_the_same_check_catches_a_test_for_one_n_that_is_looked_at_every_time():
    random = np.random.default_rng(0)
    counts = (random.random((DRAWS, 600)) < 0.2).cumsum(axis=-1)
    n = np.arange(1, 601)
    assert (binom.sf(counts - 1, n, 0.2) <= DELTA).any(axis=-1).mean() > 2 * ALLOWED


def test_a_real_drift_is_found_early():
    random = np.random.default_rng(1)
    losses = random.beta(2, 18, (200, 400))  # a mean of 0.1
    found = p_above(losses, 0.05) <= DELTA
    assert found[:, -1].all()
    assert np.median(found.argmax(axis=-1)) < 40
    assert (p_below(losses, 0.2) <= DELTA)[:, -1].all()


def test_more_text_at_the_end_does_not_change_what_was_said_before():
    losses = np.random.default_rng(2).random(100)
    for test in (p_above, p_below):
        assert test(losses[:40], 0.4).tolist() == test(losses, 0.4)[:40].tolist()


@pytest.mark.parametrize("losses", [[0.0] * 300, [1.0] * 300, [0.5], [0.0], [1.0], [0.3] * 300])
@pytest.mark.parametrize("level", [1e-12, 0.05, 0.99])
def test_the_interval_contains_the_mean_and_agrees_with_the_p_values(losses, level):
    with np.errstate(all="raise", under="ignore"):
        low, high = risk_interval(losses, level)
        mean = sum(losses) / len(losses)
        assert 0 <= low <= mean + 1e-9
        assert mean - 1e-9 <= high <= 1
        if low > 0:
            assert p_above(losses, 0.99 * low)[-1] <= level < p_above(losses, low * 1.01)[-1]
        if high < 1:
            above = high + 0.01 * (1 - high)
            assert p_below(losses, above)[-1] <= level


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan, math.inf])
def test_losses_outside_0_and_1_are_a_config_error(wrong):
    for test in (p_above, p_below):
        with pytest.raises(ConfigError, match="losses: expected numbers from 0 to 1, got"):
            test([0.0, wrong], 0.1)


def test_a_text_that_changes_is_broken_and_says_when(certificate, make_trace):
    """The first half keeps the promise, and a look at it says so; then every token is wrong."""
    trace = make_trace(800, seed=1)
    half = trace.tokens(slice(0, trace.num_tokens // 2))
    trace.argmax[0, trace.num_tokens // 2 :] = 1
    careful = replace(certificate, epsilon=0.1)
    first, second = check_drift(careful, half), check_drift(careful, trace)
    assert first.verdict == "holds"
    assert first.decided_after is not None
    assert second.verdict == "broken"
    assert second.decided_after is not None
    assert second.decided_after > 400
    assert second.p_holds == first.p_holds


def test_the_sentence_says_what_a_look_costs(certificate, make_trace):
    for trace, epsilon, said in (
        (make_trace(400, seed=1), 0.3, "The promise holds"),
        (make_trace(5, seed=1), 0.05, "Not decided"),
    ):
        check = check_drift(replace(certificate, epsilon=epsilon), trace)
        sentence = drift_sentence(vars(check))
        assert sentence.startswith(said)
        assert (check.decided_after is None) == ("To decide it" in sentence)
