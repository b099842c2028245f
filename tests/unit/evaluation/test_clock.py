from dataclasses import replace

import pytest

from offramp.evaluation.clock import Clock, Part
from offramp.models.work import Work


def part(*seconds):
    return Part(
        bytes=100.0, flops=50.0, seconds=dict(zip((1, 2, 4), map(float, seconds), strict=False))
    )


@pytest.fixture
def clock():
    return Clock(
        block=part(10, 12, 20),
        keys_values=part(1, 1, 2),
        heads={2: part(5, 5), 4: part(6, 7)},
        evaluations={2: part(7, 8)},
        drafts={2: part(3)},
        bandwidth=1000.0,
        weights=250.0,
    )


def test_a_part_takes_what_was_measured_and_in_between_in_proportion(clock):
    assert [clock.block.of(tokens) for tokens in (1, 2, 3, 4, 8)] == [10, 12, 16, 20, 40]
    assert clock.block.bytes_per_second() == 10.0


def test_work_takes_the_sum_of_its_parts(clock):
    work = Work()
    work.blocks[1] += 6
    work.blocks[2] += 2
    work.keys_values[4] += 3
    work.heads[4, 1] += 2
    work.evaluations[2, 1] += 5
    work.drafts[2, 1] += 1
    assert clock.seconds(work, 9) == 6 * 10 + 2 * 12 + 3 * 2 + 2 * 6 + 5 * 7 + 3
    assert work.layers_run == 6 + 4


def test_of_two_measurements_each_part_counts_by_the_shorter(clock):
    other = replace(
        clock,
        block=part(9, 13, 20),
        keys_values=part(2, 0.5, 2),
        heads={2: part(4, 6), 4: part(6, 7)},
        evaluations={2: part(8, 7)},
        drafts={2: part(2)},
        bandwidth=900.0,
    )
    both = clock.faster(other)
    assert list(both.block.seconds.values()) == [9, 12, 20]
    assert list(both.keys_values.seconds.values()) == [1, 0.5, 2]
    assert list(both.heads[2].seconds.values()) == [4, 5]
    assert list(both.evaluations[2].seconds.values()) == [7, 7]
    assert list(both.drafts[2].seconds.values()) == [2]
    assert both.bandwidth == 1000.0


def test_a_clock_is_pinned_to_full_depth_and_then_to_evaluations(clock):
    full, evaluated = Work(), Work()
    for work in (full, evaluated):
        work.blocks[1] += 4
        work.heads[4, 1] += 1
    evaluated.evaluations[2, 1] += 2
    pinned = clock.pinned(full, 10, 46 + 30.0)
    assert pinned.token_seconds == 3.0
    assert pinned.seconds(full, 10) == 76.0
    pinned = pinned.pinned(evaluated, 10, 76 + 14 + 8.0)
    assert pinned.evaluation_seconds == 4.0
    assert pinned.seconds(evaluated, 10) == 98.0
    assert pinned.seconds(full, 10) == 76.0
    # parts that decoding runs in fewer calls than they were timed in take less
    assert clock.pinned(full, 10, 44.0).seconds(full, 10) == 44.0
    assert clock.pinned(evaluated, 10, 50.0).seconds(evaluated, 10) == 50.0
    heads = sum(clock.heads[layer].of(n) * count for (layer, n), count in full.heads.items())
    assert clock.pinned(full, 10, 1.0).token_seconds == -heads / 10  # no token takes less
