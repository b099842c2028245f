"""A straight line by least squares: against scipy, and how often its intervals hold the truth."""

import numpy as np
import pytest
from scipy import stats

from offramp.studies.line import fit_line

X = np.repeat([5.5, 5.8, 6.1, 6.3], 3)


def test_the_slope_and_its_p_value_are_those_of_scipy():
    y = 0.1 - 0.02 * X + np.random.default_rng(0).normal(0, 0.01, len(X))
    line, theirs = fit_line(X, y), stats.linregress(X, y)
    assert line.slope == pytest.approx(theirs.slope)
    assert line.at(0.0) == pytest.approx(theirs.intercept)
    assert line.p_value == pytest.approx(theirs.pvalue)
    half = stats.t.ppf(0.975, len(X) - 2) * theirs.stderr
    assert line.slope_interval == pytest.approx((theirs.slope - half, theirs.slope + half))
    half = stats.t.ppf(0.975, len(X) - 2) * theirs.intercept_stderr
    assert line.interval(0.0) == pytest.approx((theirs.intercept - half, theirs.intercept + half))


@pytest.mark.parametrize("of_a_point", [False, True])
def test_intervals_hold_the_truth_as_often_as_they_say(of_a_point):
    rng, held, far = np.random.default_rng(1), 0, 8.0
    for _ in range(600):
        line = fit_line(X, 0.3 - 0.05 * X + rng.normal(0, 0.02, len(X)))
        low, high = line.interval(far, of_a_point=of_a_point)
        held += low <= 0.3 - 0.05 * far + of_a_point * rng.normal(0, 0.02) <= high
    assert held / 600 == pytest.approx(0.95, abs=0.03)


def test_a_value_that_is_not_known_is_left_out():
    y = 1.0 + 2.0 * X
    y[3] = np.nan
    line = fit_line(X, y)
    assert (line.count, line.slope) == (11, pytest.approx(2.0))


def test_what_two_points_or_one_place_cannot_say():
    two = fit_line(np.asarray([1.0, 2.0]), np.asarray([1.0, 3.0]))
    assert (two.slope, two.at(3.0)) == (2.0, 5.0)
    assert (two.slope_interval, two.p_value, two.interval(3.0)) == (None, None, None)
    assert fit_line(np.asarray([1.0, 1.0, 1.0]), np.asarray([1.0, 2.0, 3.0])) is None
    assert fit_line(np.asarray([]), np.asarray([])) is None
