import math

import numpy as np
import pytest

from offramp.errors import ConfigError
from offramp.evaluation.cost import ModelCost
from offramp.evaluation.quality import auroc, frontier, quality, reliability, risk_coverage
from offramp.evaluation.trace import ExitTrace


def array(*values):
    return np.array(values, dtype=np.float32)


def test_risk_and_coverage_by_hand():
    curve = risk_coverage(array(0.2, 0.9, 0.5, 0.7), np.array([1, 0, 1, 0]))
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert curve.area == pytest.approx((1 / 3 + 1 / 2) / 4)


def test_tokens_with_equal_scores_have_no_order():
    """Of the three at 0.5 one is wrong: each counts a third, wherever it stands."""
    scores, losses = array(0.5, 0.5, 0.9, 0.5), np.array([1, 0, 0, 0])
    expected = pytest.approx([0, 1 / 6, 2 / 9, 1 / 4])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]):
        assert risk_coverage(scores[order], losses[order]).risk.tolist() == expected


def test_auroc_by_hand():
    """Of the 4 pairs of a right and a wrong one, 2 are in order and 1 is a tie."""
    right = np.array([True, True, False, False])
    assert auroc(array(0.9, 0.4, 0.4, 0.5), right) == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert auroc(array(0.9, 0.8, 0.1, 0.2), right) == 1.0
    assert auroc(array(0.1, 0.2, 0.9, 0.8), right) == 0.0
    assert auroc(array(3, 3, 3, 3), right) == 0.5


def test_auroc_needs_both_kinds():
    assert math.isnan(auroc(array(0.1, 0.2), np.array([True, True])))


def test_reliability_by_hand():
    scores = array(0.05, 0.1, 0.6, 0.9, 1.0, 0.95)
    right = np.array([False, True, True, True, True, False])
    said = reliability(scores, right, bins=2)
    assert said.count.tolist() == [2, 4]
    assert said.confidence.tolist() == pytest.approx([0.075, 3.45 / 4])
    assert said.accuracy.tolist() == [0.5, 0.75]
    assert said.ece == pytest.approx((2 * (0.5 - 0.075) + 4 * (3.45 / 4 - 0.75)) / 6)


def test_an_empty_bin_says_nothing():
    said = reliability(array(0.9, 1.0), np.array([True, True]), bins=2)
    assert math.isnan(said.accuracy[0])
    assert said.ece == pytest.approx(0.05)


def test_no_tokens_are_a_config_error():
    for measure in (risk_coverage, reliability):
        with pytest.raises(ConfigError, match="at least one token"):
            measure(array(), np.zeros(0, dtype=bool))


@pytest.fixture
def trace():
    """Exit 1 agrees with layer 3 on the tokens 0 and 2, exit 2 on all but the last."""
    return ExitTrace(
        num_layers=3,
        exit_layers=(1, 2, 3),
        targets=np.zeros(4, dtype=np.int64),
        nll=np.log(array(2, 4, 2, 8, 2, 2, 2, 2, 2, 2, 2, 2)).reshape(3, 4),
        argmax=np.array([[5, 6, 7, 8], [5, 5, 7, 8], [5, 5, 7, 9]]),
        confidence={
            "max_prob": array(0.9, 0.2, 0.8, 0.4, 0.5, 0.6, 0.7, 0.2, 0, 0, 0, 0).reshape(3, 4),
            "gain": np.zeros((3, 4), dtype=np.float32),
        },
    )


def test_each_exit_is_held_against_the_last_layer(trace):
    first, second = quality(trace, "max_prob")
    assert (first.exit_layer, first.agreement, first.auroc) == (1, 0.5, 1.0)
    assert first.aurc == pytest.approx((1 / 3 + 1 / 2) / 4)
    assert (second.exit_layer, second.agreement, second.auroc) == (2, 0.75, 1.0)
    assert first.reliability is not None
    assert first.reliability.ece == pytest.approx((0.1 + 0.2 + 0.2 + 0.4) / 4)
    assert first.reliability_target is not None  # the target is token 0, which nobody says
    assert first.reliability_target.ece == pytest.approx((0.9 + 0.2 + 0.8 + 0.4) / 4)
    assert [part.reliability for part in quality(trace, "gain")] == [None, None]
    with pytest.raises(ConfigError, match="the last layer, 3, among"):
        quality(trace.at((1, 2)), "max_prob")


def test_a_frontier_goes_from_the_full_model_to_the_first_exit(trace):
    cost = ModelCost(
        exit_layers=(1, 2, 3), context=1.0, layers=(30.0,) * 3, heads=dict.fromkeys((1, 2, 3), 10.0)
    )
    rows = frontier(trace, "max_prob", cost=cost, shares=(0.0, 0.5, 1.0))
    assert [row.exit_share[1] for row in rows] == [0.0, 0.5, 1.0]
    assert [row.flops_pct for row in rows] == pytest.approx([100, (40 * 2 + 80 + 120) / 4, 40])
    assert rows[0].ppl == pytest.approx(2)
    assert rows[2].ppl == pytest.approx(2 ** ((1 + 2 + 1 + 3) / 4))
    assert rows[1].threshold == pytest.approx((0.8, 0.6))  # a half at each exit could leave
    with pytest.raises(ConfigError, match="shares"):
        frontier(trace, "max_prob", shares=(1.5,))
