"""The bounds of an audit by hand, at the edges, as JSON, and with wrong values."""

import json
import math

import numpy as np
import pytest

from offramp.calibration.audit import BETS, LOG_WEIGHTS, Audit, log_factors, solve_sum
from offramp.calibration.change import ChangeDetector
from offramp.calibration.keep_promise import PromiseKeeper, PromiseTest, tokens_until_trust
from offramp.errors import ConfigError


def heard(losses, *, share=0.5, delta=0.05, between=1):
    audit = Audit(share=share, delta=delta)
    for loss in losses:
        audit.left(between)
        audit.audited_loss(loss)
    return audit


def test_the_weights_are_those_of_a_mean():
    assert np.exp(LOG_WEIGHTS).sum() == pytest.approx(1.0)
    assert ((BETS > 0) & (BETS < 1)).all()


@pytest.mark.parametrize("losses", [[0.0] * 30, [1.0] * 30, [0.3, 0.0, 1.0] * 10])
def test_the_bound_is_where_the_mixture_reaches_1_over_delta(losses):
    audit = heard(losses, share=0.25, delta=0.01)
    for sign, wealth, total in (
        (1, audit.wealth, audit._sums[1]),
        (-1, audit.wealth_lower, audit._sums[0]),
    ):
        mixture = sum(
            weight * math.exp(sign * bet * total * 0.25 + part)
            for weight, bet, part in zip(np.exp(LOG_WEIGHTS), BETS, wealth, strict=True)
        )
        if total > 0:
            assert mixture == pytest.approx(100.0, rel=1e-6)
    assert audit.lower_left <= audit.estimate <= audit.upper_left


def test_before_anything_is_seen():
    audit = Audit(share=0.02)
    assert (audit.upper, audit.upper_left, audit.lower_left) == (0.0, 1.0, 0.0)
    assert audit.estimate is None
    audit.left()
    assert (audit.upper, audit.upper_left, audit.lower_left) == (1.0, 1.0, 0.0)
    audit.ran_whole(3)
    assert (audit.upper, audit.tokens) == (0.25, 4)


def test_one_observation():
    for loss in (0.0, 1.0):
        audit = heard([loss], share=1.0, between=0)
        assert audit.upper == 1.0
        assert 0 <= audit.lower_left <= loss


def test_without_losses_the_bound_falls_as_one_over_the_tokens():
    audit = heard([0.0] * 1000, share=1.0, between=0)
    assert 3.0 < audit.unseen < 5.0
    assert audit.upper * 1000 == pytest.approx(audit.unseen)
    audit.ran_whole(1000)
    assert audit.upper * 2000 == pytest.approx(audit.unseen)


def test_losses_raise_both_bounds_and_more_of_the_same_brings_them_together():
    widths = []
    for n in (50, 500, 5000):
        audit = heard([0.0, 0.0, 0.0, 1.0] * (n // 4))
        assert audit.lower_left < 0.25 < audit.upper_left
        widths.append(audit.upper_left - audit.lower_left)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.1


@pytest.mark.parametrize("delta", [1e-300, 1e-9, 0.5, 1 - 1e-12])
@pytest.mark.parametrize("losses", [[0.0] * 100, [1.0] * 100, [1e-300] * 100, [0.5]])
@pytest.mark.parametrize("share", [1e-9, 1.0])
def test_extremes_stay_numbers_in_order(delta, losses, share):
    with np.errstate(all="raise", under="ignore"):
        audit = heard(losses, share=share, delta=delta)
        assert 0 <= audit.lower_left <= audit.upper_left <= 1
        assert 0 <= audit.upper <= 1


def test_the_solution_is_never_left_of_where_it_should_be():
    random = np.random.default_rng(0)
    wealth = log_factors(random.random((200, 50)) ** 4).sum(axis=1)
    for delta in (1e-100, 0.05, 0.999):
        found = solve_sum(wealth, delta)
        mixture = np.exp(wealth + LOG_WEIGHTS + BETS * found[:, None] + math.log(delta)).sum(axis=1)
        assert mixture == pytest.approx(1.0, rel=1e-6)


def test_the_state_is_json_and_comes_back():
    audit = heard([0.25, 0.0, 1.0], share=0.02)
    for value in (
        audit,
        PromiseKeeper(epsilon=0.05, steps=4, step=2),
        PromiseTest(epsilon=0.1),
        ChangeDetector(high=0.1, low=0.01),
    ):
        again = type(value).load(json.loads(json.dumps(value.state())))
        assert again == value
    again = Audit.load(json.loads(json.dumps(audit.state())))
    for loss in (0.0, 0.5):
        audit.audited_loss(loss)
        again.audited_loss(loss)
    assert (again.upper, again.lower_left) == (audit.upper, audit.lower_left)


@pytest.mark.parametrize("loss", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_a_loss_outside_0_and_1_is_one_sentence_and_changes_nothing(loss):
    for value, observe in (
        (audit := Audit(share=0.5), audit.audited_loss),
        (test := PromiseTest(epsilon=0.1), test.observe),
        (detector := ChangeDetector(high=0.1), detector.observe),
    ):
        before = value.state()
        with pytest.raises(ConfigError, match=f"loss: expected a number from 0 to 1, got {loss}"):
            observe(loss)
        assert value.state() == before


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_a_share_outside_0_and_1_is_one_sentence(share):
    with pytest.raises(ConfigError, match="audit: expected a share above 0 and at most 1, got"):
        Audit(share=share)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Audit(share=0.5, delta=0.0), "delta: expected"),
        (lambda: Audit(share=0.5, audited=2, tokens_left=1, tokens=3), "audited <= tokens_left"),
        (lambda: Audit(share=0.5, lost=1.0), "lost: expected from 0 to 0, got 1.0"),
        (lambda: Audit(share=0.5, wealth=[0.0]), "wealth: expected 15 logarithms"),
        (lambda: Audit(share=0.5, wealth=[1.0] * 15), "wealth: expected 15 logarithms"),
        (lambda: Audit.load({"share": "much"}), "share: expected a number"),
        (lambda: Audit.load({"share": 0.5, "tokens": 1e400}), "tokens"),
        (lambda: Audit.load([]), "expected"),
        (lambda: Audit.load({}), "share"),
        (lambda: Audit(share=0.5).left(-1), "tokens: expected a whole number from 0, got -1"),
        (lambda: Audit(share=0.5).ran_whole(0.5), "tokens: expected a whole number"),
        (lambda: ChangeDetector(high=0.0), "high above 0"),
        (lambda: ChangeDetector(high=0.1, low=0.2), "low <= high"),
        (lambda: ChangeDetector(high=math.nan), "change: expected"),
        (lambda: ChangeDetector(high=0.1, run_length=math.inf), "run_length: expected"),
        (lambda: ChangeDetector(high=0.1, statistics=[-1.0] * 12), "statistics: expected"),
        (lambda: PromiseKeeper(epsilon=1.5, steps=3), "epsilon: expected"),
        (lambda: PromiseKeeper(epsilon=0.1, steps=0), "steps: expected at least 1"),
        (lambda: PromiseKeeper(epsilon=0.1, steps=2, step=3), "steps: expected"),
        (lambda: PromiseKeeper(epsilon=0.1, steps=2, credit=math.nan), "credit: expected"),
        (lambda: PromiseTest(epsilon=0.0), "epsilon: expected"),
        (lambda: PromiseTest(epsilon=0.1, total=2.0, observed=1), "promise test: expected"),
        (lambda: PromiseTest(epsilon=0.1, log_wealth=1.0), "log_wealth: expected"),
    ],
)
def test_wrong_values_are_one_sentence(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_keeper_lets_no_token_leave_that_could_break_the_promise():
    keeper, audit = PromiseKeeper(epsilon=0.1, steps=1), Audit(share=1.0)
    positions = []
    for _ in range(40):
        positions.append(keeper.next_step(audit))
        audit.audited_loss(1.0) if positions[-1] else audit.ran_whole()
        assert audit.lost <= 0.1 * audit.tokens
    assert positions[:10] == [0] * 9 + [1]


def test_tokens_that_are_decided_but_not_recorded_count_as_lost():
    keeper, audit = PromiseKeeper(epsilon=0.1, steps=1), Audit(share=0.5)
    audit.ran_whole(19)
    assert keeper.next_step(audit) == 1
    assert keeper.next_step(audit, pending=1) == 1
    assert keeper.next_step(audit, pending=2) == 0


def test_credit_lets_tokens_leave_from_the_start():
    keeper, audit = PromiseKeeper(epsilon=0.1, steps=3, credit=2.0), Audit(share=0.5)
    assert keeper.next_step(audit) == 1
    assert keeper.next_step(audit, pending=2) == 0


def test_the_keeper_relaxes_with_evidence_and_tightens_at_once():
    keeper, audit = PromiseKeeper(epsilon=0.1, steps=3), Audit(share=0.5)
    for _ in range(10 * tokens_until_trust(0.1, 0.5, 0.05)):
        if keeper.next_step(audit):
            audit.audited_loss(0.0)
            audit.left()
        else:
            audit.ran_whole(2)
    assert keeper.step == 3
    moves = []
    while keeper.next_step(audit):
        moves.append(keeper.step)
        audit.audited_loss(1.0)
    assert moves == sorted(moves, reverse=True)
    assert moves[-1] < 3
    assert audit.upper <= 0.1 + 1 / audit.tokens / 0.5


def test_varying_bets_by_hand():
    test = PromiseTest(epsilon=0.1)
    wealth = 1.0
    for loss in (0.0, 1.0, 0.0, 0.0):
        wealth *= 1 + test.bet * (0.1 - loss)
        test.observe(loss)
    assert math.exp(test.log_wealth) == pytest.approx(wealth)
    assert test.p_value == pytest.approx(1 / (1 + 0.1 * PromiseTest(epsilon=0.1).bet))


def test_an_alarm_starts_the_statistics_again():
    detector = ChangeDetector(high=0.1, run_length=10)
    alarms = [detector.observe(1.0) for _ in range(20)]
    assert True in alarms
    first = alarms.index(True)
    assert alarms.index(True, first + 1) == 2 * first + 1
    quiet = ChangeDetector(high=0.1)
    assert not any(quiet.observe(0.0) for _ in range(1000))
