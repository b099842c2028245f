"""Ladders go from careful to bold in every measure, and never below a text's own thresholds."""

import math

import numpy as np
import pytest

from offramp.calibration.risk import check_path
from offramp.exits.confidence import CONFIDENCE
from offramp.exits.policy import Decay, GainPolicy, ThresholdPolicy
from offramp.generation.exit_rule import ExitRule
from offramp.generation.ladder import RUNGS, ladder_of

THRESHOLDS = [-math.inf, -5.0, -0.3, 0.0, 0.4, 0.9, 1.0, 2.0, 3.5, math.inf]


def policies(policy, confidence):
    ladder = ladder_of(ExitRule(policy=policy, confidence=confidence), 5)
    assert len(ladder) == RUNGS + 1
    assert ladder[0] is None
    assert ladder[-1].policy is policy
    assert {each.confidence for each in ladder[1:]} == {confidence}
    return [each.policy for each in ladder[1:]]


@pytest.mark.parametrize("confidence", CONFIDENCE)
def test_thresholds_never_rise_along_a_ladder(confidence):
    random = np.random.default_rng(0)
    for _ in range(30):
        own = tuple(random.choice(THRESHOLDS, 4).tolist())
        found = policies(ThresholdPolicy(thresholds=own), confidence)
        check_path([each.thresholds for each in found], 5)  # raises ConfigError if one does
        for one in zip(*(each.thresholds for each in found), strict=True):
            assert not any(math.isnan(each) for each in one)


@pytest.mark.parametrize(
    ("confidence", "threshold", "first"),
    [
        ("max_prob", 0.9, 1 - 0.1 / 32),
        ("margin", 0.36, 0.98),
        ("gate", -math.inf, 1 - 1 / 32),
        ("gain", -0.32, -0.01),
        ("gain", -math.inf, -3 / 32),
        ("patience", 2.0, 4.5),  # more than any of four exits can count to
    ],
)
def test_the_first_rung_asks_for_much_more(confidence, threshold, first):
    found = policies(ThresholdPolicy.of(threshold, 5), confidence)
    assert found[0].thresholds == pytest.approx((first,) * 4)
    assert len({each.thresholds for each in found}) == RUNGS


@pytest.mark.parametrize("confidence", ["max_prob", "gain"])
def test_a_threshold_that_no_token_reaches_stays(confidence):
    policy = ThresholdPolicy.of(math.inf, 5)
    assert {each.thresholds for each in policies(policy, confidence)} == {policy.thresholds}


def test_falling_thresholds_and_prices_have_ladders_too():
    falling = ThresholdPolicy.of(0.6, 5, decay=Decay(tau=4.0, length=10))
    places = np.arange(10)
    bounds = [each.bound(0, np.dtype("float64"), places) for each in policies(falling, "max_prob")]
    assert (np.diff(bounds, axis=0) < 0).all()
    priced = GainPolicy(price=0.64, costs=(20.0, 40.0, 60.0, 80.0, 100.0))
    assert [each.price for each in policies(priced, "gain")] == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64]
