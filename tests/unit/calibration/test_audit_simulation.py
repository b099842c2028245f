"""The bound of an audit holds at all times over simulated streams, and the classic mistakes do not.

1,000 streams of 5,000 audited tokens. The risk drifts, or an adversary sets it after each look at
the bound. The gap to the next audited token is geometric, as coins with the share's probability
make it; between two audits the risk stays as it was set.
"""

import math

import numpy as np
import pytest
from scipy.stats import beta

from offramp.calibration.audit import BETS, Audit, log_factors, solve_sum
from offramp.calibration.change import FRACTIONS, ChangeDetector, e_values
from offramp.calibration.keep_promise import PromiseKeeper, PromiseTest

STREAMS, AUDITS = 1000, 5000
DELTA = 0.05


def allowed(streams):
    return DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / streams)  # three standard errors


class TimeUniform:
    """The bound of ``Audit`` for many streams: the same functions, with one row for each."""

    def __init__(self, streams, share):
        self.wealth = np.zeros((streams, len(BETS)))
        self.share = share
        self.most = solve_sum(self.wealth, DELTA) / self.share

    def observe(self, losses, tokens):
        changed = losses > 0
        self.wealth[changed] += log_factors(losses[changed])
        self.most[changed] = solve_sum(self.wealth[changed], DELTA) / self.share[changed]

    def most_lost(self, tokens):
        return np.minimum(tokens, self.most)


class FixedN:
    """The mistake of a bound for one n, Clopper and Pearson's, that is looked at every time."""

    def __init__(self, streams, share):
        self.lost, self.audited = np.zeros(streams), 0
        self.bound = np.ones(streams)

    def observe(self, losses, tokens):
        self.lost += losses
        self.audited += 1
        if self.audited % 10 == 0:  # as often is enough to fail
            self.bound = beta.ppf(1 - DELTA, self.lost + 1, self.audited - self.lost)

    def most_lost(self, tokens):
        return tokens * np.where(np.isnan(self.bound), 1.0, self.bound)


class VaryingBets:
    """The mistake of bets that follow the losses, in a bound on the mean of risks that drift.

    The bound is the least of some means whose test has rejected them. Each bet is predictable.
    """

    MEANS = np.array([0.02, 0.05, 0.1, 0.2])

    def __init__(self, streams, share):
        self.wealth = np.zeros((streams, len(self.MEANS)))
        self.lost, self.audited = np.zeros((streams, 1)), 1

    def observe(self, losses, tokens):
        edge = np.maximum(0.0, self.MEANS - self.lost / self.audited)
        bets = np.minimum(0.9, edge / (self.MEANS * (1 - self.MEANS)))
        self.wealth += np.log1p(bets * (self.MEANS - losses[:, None]))
        self.lost += losses[:, None]
        self.audited += 1

    def most_lost(self, tokens):
        rejected = self.wealth >= -math.log(DELTA)
        return tokens * np.where(rejected, self.MEANS, 1.0).min(axis=1)


def drift(step, upper, mean):
    """A slow wave, with jumps."""
    wave = 0.05 * (1 + np.sin(step / 300 + np.arange(len(mean)))) / 2
    return np.where((step // 1000) % 3 == 1, 0.4 * wave, wave)


def chase(step, upper, mean):
    """The adversary: much risk as soon as the bound is near the truth, or low; else little."""
    return np.where((upper < 1.2 * mean) | (upper < 0.06), 0.5, 0.01)


def stay_just_above(step, upper, mean):
    """The adversary: keeps the true mean where the bound was when it was lowest."""
    return np.where(mean < upper * 0.95, np.minimum(1.0, 1.5 * upper), 0.0)


def wait(step, upper, mean):
    """The adversary: no risk until the bets are bold, then much."""
    return np.full(len(mean), 0.5 if step > 300 else 0.0)


def hold(step, upper, mean):
    return np.full(len(mean), 0.1)


def broken_shares(bound, adversaries, *, share=0.02, streams=STREAMS, audits=AUDITS, seen=None):
    """For each adversary, in how many streams the true running mean is ever above the bound.

    Losses are 0 or 1 in most of the streams, and skewed shares in every fifth. ``seen`` says
    with which probability an audited loss is recorded: sampling by the outcome.
    """
    random = np.random.default_rng(0)
    rows = streams * len(adversaries)
    share = np.resize(np.asarray(share, dtype=np.float64), rows)
    found = bound(rows, share)
    lost, tokens = np.zeros(rows), np.zeros(rows)
    broken = np.zeros(rows, dtype=bool)
    binary = np.arange(rows) % 5 > 0
    upper = np.ones(rows)
    for step in range(audits):
        known = [np.split(a, len(adversaries)) for a in (upper, lost / (tokens + 1e-9))]
        risk = np.concatenate(
            [adversary(step, *past) for adversary, *past in zip(adversaries, *known, strict=True)]
        )
        gap = random.geometric(share)
        lost, tokens = lost + gap * risk, tokens + gap
        broken |= lost - risk > found.most_lost(tokens - 1) + 1e-9
        draw = random.random(rows)
        losses = (draw < risk).astype(np.float64)
        with np.errstate(divide="ignore"):
            losses[~binary] = draw[~binary] ** (1 / risk[~binary] - 1)
        if seen is not None:
            losses = np.where(random.random(rows) < seen(losses), losses, 0.0)
        found.observe(losses, tokens)
        most = found.most_lost(tokens)
        broken |= lost > most + 1e-9
        upper = most / tokens
    return broken.reshape(len(adversaries), -1).mean(axis=1).tolist()


def check_bound(bound, adversaries, **chosen):
    """What every bound is held to."""
    for adversary, share in zip(
        adversaries, broken_shares(bound, adversaries, **chosen), strict=True
    ):
        most = allowed(chosen.get("streams", STREAMS))
        assert share <= most, f"{adversary.__name__}: broken in {share:.1%}"


def test_the_bound_covers_at_all_times():
    """1,000 streams for each adversary; half audit 2% of their tokens, and half every token."""
    check_bound(TimeUniform, [drift, chase, stay_just_above], share=[0.02] * 5 + [1.0] * 5)


def test_a_fixed_n_bound_at_every_step_is_caught():
    with pytest.raises(AssertionError, match="broken in"):
        check_bound(FixedN, [hold], streams=200, audits=2000)


def test_sampling_after_seeing_outcomes_is_caught():
    """Every second loss is not recorded: such as an audit that gives up where the text ends."""
    with pytest.raises(AssertionError, match="broken in"):
        check_bound(TimeUniform, [hold], streams=200, audits=1000, seen=lambda losses: 0.5)


def test_varying_bets_in_a_bound_on_the_mean_are_caught():
    check_bound(TimeUniform, [wait], streams=200, audits=1000)
    check_bound(VaryingBets, [hold], streams=200, audits=1000, share=1.0)  # no drift, no harm
    with pytest.raises(AssertionError, match="broken in"):
        check_bound(VaryingBets, [wait], streams=200, audits=1000, share=1.0)


def test_the_bound_is_near_the_truth():
    """A bound of 1 would cover, too: after 5,000 audited tokens at 10% it is within a fifth."""
    random = np.random.default_rng(1)
    for share in (0.02, 1.0):
        audit = Audit(share=share)
        for loss in random.random(AUDITS) < 0.1:
            audit.left(round(1 / share) - 1)
            audit.audited_loss(float(loss))
        assert 0.1 < audit.upper < 0.12
        assert 0.08 < audit.lower_left < 0.1


def test_the_classes_and_the_arrays_of_these_streams_are_the_same():
    random = np.random.default_rng(2)
    losses = random.random(200) ** 8
    audit, rows = Audit(share=0.1), TimeUniform(1, np.array([0.1]))
    for loss in losses:
        audit.left(9)
        audit.audited_loss(float(loss))
        rows.observe(np.array([loss]), None)
    assert audit.upper == pytest.approx(float(rows.most_lost(audit.tokens)[0]) / audit.tokens)


def test_varying_bets_hold_against_the_null_that_every_mean_is_at_least_epsilon():
    """And they do reject where risks are lower."""
    random = np.random.default_rng(3)
    found = {}
    for risk in (0.1, 0.02):
        p_values = []
        for _ in range(300):
            test = PromiseTest(epsilon=0.1)
            for loss in random.random(200) < risk:
                test.observe(float(loss))
            p_values.append(test.p_value)
        found[risk] = float(np.mean(np.array(p_values) <= DELTA))
    assert found[0.1] <= allowed(300)
    assert found[0.02] > 0.9


def run_keeper(keeper, risks, seed, share=0.1):
    """Return (most excess of the sum of risks over the promise, share that left in the end)."""
    random = np.random.default_rng(seed)
    audit, lost, excess, left = Audit(share=share), 0.0, 0.0, 0
    coins, draws = random.random(len(risks)), random.random(len(risks))
    for t, ladder in enumerate(risks):
        step = keeper.next_step(audit)
        if not step:
            audit.ran_whole()
        else:
            lost += ladder[step]
            left += t >= len(risks) - 2000
            if coins[t] < share:
                audit.audited_loss(float(draws[t] < ladder[step]))
            else:
                audit.left()
        excess = max(excess, lost - keeper.epsilon * audit.tokens - keeper.credit)
    return excess, left / 2000


def test_the_keeper_keeps_the_promise_under_a_change_and_uses_the_ladder_before():
    """The risk of every step rises in the middle, to far above the promise."""
    before, after = (0.0, 0.002, 0.005, 0.01), (0.0, 0.1, 0.2, 0.4)
    calm = [before] * 8000
    broken = 0
    for seed in range(20):
        keeper = PromiseKeeper(epsilon=0.05, steps=3)
        excess, left = run_keeper(keeper, calm, seed)
        broken += excess > 0
        assert left > 0.9, "the keeper lets hardly any token leave"
        excess, left = run_keeper(
            PromiseKeeper(epsilon=0.05, steps=3), calm[4000:] + [after] * 6000, seed
        )
        broken += excess > 0
    assert broken <= allowed(40) * 40


def test_the_detector_rarely_cries_wolf_and_notices_a_change():
    """Under the null, the mean time to the first alarm is at least ``run_length``."""
    random = np.random.default_rng(4)
    run_length, streams = 500, 400
    for low, risk in ((0.0, 0.1), (0.05, 0.07)):
        statistic, first = np.zeros((streams, 2 * len(FRACTIONS))), np.full(streams, 3000.0)
        used = slice(None) if low else slice(len(FRACTIONS))
        for step in range(3000):
            losses = (random.random(streams) < risk).astype(np.float64)
            statistic = (statistic + 1) * e_values(losses, low, 0.1)
            alarm = statistic[:, used].mean(axis=1) >= run_length
            first = np.where(alarm & (first == 3000), step + 1, first)
        assert first.mean() >= run_length  # cut off at 3,000, so it is a lower bound
    for before, after in ((0.1, 0.5), (0.1, 0.0)):
        detector = ChangeDetector(low=0.05, high=0.12, run_length=run_length)
        early = [detector.observe(float(loss)) for loss in random.random(100) < before]
        late = [detector.observe(float(loss)) for loss in random.random(400) < after]
        assert not any(early)
        assert any(late)
