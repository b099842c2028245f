import numpy as np
import pytest
from scipy import stats

from offramp.studies.statistics import (
    Comparison,
    compare_below,
    compare_best,
    distance_in_std,
    effect_size,
    holm,
    interval_pct,
    paired_test,
    power_of_test,
    seeds_for_power,
    stat,
    verdict,
)


def test_stat_gives_the_sample_standard_deviation():
    summary = stat([1.0, 2.0, 3.0, 6.0])
    assert summary["mean"] == 3.0
    assert summary["std"] == pytest.approx((14 / 3) ** 0.5)
    assert summary["values"] == [1.0, 2.0, 3.0, 6.0]


def test_one_seed_has_no_standard_deviation_and_no_p():
    assert stat([4.0])["std"] is None
    assert paired_test(np.array([0.3])) is None
    assert compare_below(np.array([1.0]), np.array([2.0])).p_value is None


def test_the_paired_test_is_scipys_paired_t_test():
    first, second = np.array([1.0, 2.5, 3.1, 0.2]), np.array([1.4, 2.4, 3.9, 0.9])
    expected = stats.ttest_rel(first, second).pvalue
    assert paired_test(first - second) == pytest.approx(expected)


def test_equal_differences_do_not_give_nan():
    assert paired_test(np.zeros(3)) == 1.0
    assert paired_test(np.full(3, 0.5)) is None


def test_holm_by_hand():
    # sorted: .01 x 4, .02 x 3, .03 x 2 = .06, .9 x 1
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.01, None, 0.04]) == pytest.approx([0.02, None, 0.04])
    assert holm([0.8, 0.9]) == [1.0, 1.0]


def test_seeds_without_a_measurement_are_left_out():
    with_gap = compare_below(np.array([1.0, np.nan, 2.0, 1.5]), np.array([2.0, 0.0, 2.5, 2.2]))
    without = compare_below(np.array([1.0, 2.0, 1.5]), np.array([2.0, 2.5, 2.2]))
    assert with_gap == without


def test_the_best_must_beat_every_rival():
    own = np.array([1.0, 1.1, 0.9, 1.05])
    near = own + np.array([0.01, -0.005, 0.02, 0.0])
    far = own + np.array([1.0, 1.1, 0.9, 1.0])
    best = compare_best(own, [near, far])
    assert best.claimed_direction
    assert best.p_value == compare_below(own, near).p_value  # the larger of the two


def test_a_rival_that_is_surely_ahead_counts_against_the_claim():
    own = np.array([1.0, 1.1, 0.9, 1.05])
    ahead = own - np.array([0.5, 0.52, 0.48, 0.51])
    behind = own + 0.1 * own
    result = compare_best(own, [ahead, behind])
    assert not result.claimed_direction
    assert result.p_value == pytest.approx(2 * compare_below(own, ahead).p_value)
    assert verdict(result, result.p_value) == "does not hold"


@pytest.mark.parametrize(
    ("claimed", "p_value", "expected"),
    [
        (True, 0.049, "holds"),
        (False, 0.049, "does not hold"),
        (True, 0.05, "undecided"),
        (True, None, "undecided"),
    ],
)
def test_verdicts(claimed, p_value, expected):
    comparison = Comparison(claimed_direction=claimed, p_value=p_value, seeds=3)
    assert verdict(comparison, p_value) == expected


def test_distance_in_standard_deviations():
    assert distance_in_std(5.0, [1.0, 2.0, 3.0]) == pytest.approx(3.0)
    assert distance_in_std(5.0, [1.0]) is None
    assert distance_in_std(5.0, [1.0, 1.0]) is None


def test_two_seeds_never_give_a_verdict():
    far = compare_below(np.array([1.0, 1.0]), np.array([2.0, 2.0 + 1e-9]))
    assert far.p_value < 1e-6
    assert verdict(far, far.p_value) == "undecided"
    best = compare_best(np.array([1.0, 1.0]), [np.array([2.0, 2.0 + 1e-9])])
    assert verdict(best, best.p_value) == "undecided"
    assert interval_pct(np.array([0.1, 0.1001])) is None


def test_the_interval_is_that_of_the_t_distribution():
    ratios = np.log([0.8, 0.9, np.nan, 1.0, 0.85])
    low, high = stats.t.interval(
        0.95, 3, loc=np.nanmean(ratios), scale=stats.sem(ratios[np.isfinite(ratios)])
    )
    assert interval_pct(ratios) == pytest.approx((100 * np.expm1(low), 100 * np.expm1(high)))
    assert all(np.isfinite(interval_pct(np.array([-900.0, 0.0, 900.0]))))


@pytest.mark.parametrize(
    ("interval", "published", "size"),
    [
        ((-16.0, -6.0), -34.2, "smaller"),
        ((-50.0, -40.0), -34.2, "larger"),
        ((-40.0, -10.0), -34.2, "as published"),
        ((-40.0, 10.0), -34.2, "undecided"),  # both zero and the published effect
        ((-2.0, 10.0), -34.2, "smaller"),  # zero, but not the published effect
        ((2.0, 10.0), -34.2, "opposite"),
        ((7.0, 16.0), 39.8, "smaller"),
        ((45.0, 60.0), 39.8, "larger"),
        ((30.0, 60.0), 39.8, "as published"),
        ((-30.0, -1.0), 39.8, "opposite"),
        ((-1.0, 40.0), 39.8, "undecided"),
        (None, 39.8, "undecided"),
    ],
)
def test_the_size_of_an_effect(interval, published, size):
    assert effect_size(interval, published) == size


def test_the_power_is_what_a_simulation_finds():
    drawn = np.random.default_rng(0).normal(0.5, 1.0, (4_000, 20))
    found = (stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05).mean()
    assert power_of_test(seeds=20, effect=-0.5, spread=1.0, significance=0.05) == pytest.approx(
        found, abs=0.03
    )
    assert power_of_test(seeds=2, effect=9.0, spread=0.1, significance=0.05) == 0.0


def test_the_number_of_seeds_is_the_smallest_with_that_power():
    wanted = {"effect": 0.095, "spread": 0.15, "significance": 0.05 / 6}
    seeds = seeds_for_power(0.9, **wanted)
    assert power_of_test(seeds=seeds, **wanted) >= 0.9
    assert power_of_test(seeds=seeds - 1, **wanted) < 0.9
