from dataclasses import replace

import pytest
import torch

from offramp.errors import ConfigError
from offramp.evaluation.clock import TOKENS, Clock, Part, measure_bandwidth, measure_clock
from offramp.exits.gate import FittedExits
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
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
        questions={2: part(7, 8)},
        drafts={2: part(3)},
        bandwidth=1000.0,
        weights=250.0,
    )


def test_a_part_takes_what_was_measured_and_in_between_in_proportion(clock):
    assert [clock.block.of(tokens) for tokens in (1, 2, 3, 4, 8)] == [10, 12, 16, 20, 40]
    assert clock.block.bytes_per_second() == 10.0


def test_what_was_asked_for_takes_the_sum_of_its_parts(clock):
    work = Work()
    work.blocks[1] += 6
    work.blocks[2] += 2
    work.keys_values[4] += 3
    work.heads[4, 1] += 2
    work.questions[2, 1] += 5
    work.drafts[2, 1] += 1
    assert clock.seconds(work, 9) == 6 * 10 + 2 * 12 + 3 * 2 + 2 * 6 + 5 * 7 + 3
    assert work.layers_run == 6 + 4


def test_of_two_measurements_each_part_counts_by_the_shorter(clock):
    other = replace(
        clock,
        block=part(9, 13, 20),
        keys_values=part(2, 0.5, 2),
        heads={2: part(4, 6), 4: part(6, 7)},
        questions={2: part(8, 7)},
        drafts={2: part(2)},
        bandwidth=900.0,
    )
    both = clock.faster(other)
    assert list(both.block.seconds.values()) == [9, 12, 20]
    assert list(both.keys_values.seconds.values()) == [1, 0.5, 2]
    assert list(both.heads[2].seconds.values()) == [4, 5]
    assert list(both.questions[2].seconds.values()) == [7, 7]
    assert list(both.drafts[2].seconds.values()) == [2]
    assert both.bandwidth == 1000.0


def test_a_clock_is_pinned_to_full_depth_and_then_to_asking(clock):
    full, asked = Work(), Work()
    for work in (full, asked):
        work.blocks[1] += 4
        work.heads[4, 1] += 1
    asked.questions[2, 1] += 2
    pinned = clock.pinned(full, 10, 46 + 30.0)
    assert pinned.token_seconds == 3.0
    assert pinned.seconds(full, 10) == 76.0
    pinned = pinned.pinned(asked, 10, 76 + 14 + 8.0)
    assert pinned.question_seconds == 4.0
    assert pinned.seconds(asked, 10) == 98.0
    assert pinned.seconds(full, 10) == 76.0
    assert clock.pinned(full, 10, 1.0).token_seconds == 0.0  # no time is below nothing


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("confidence", ["max_prob", "saturation"])
def test_every_part_of_a_model_is_measured(make_model, rows, confidence):
    model = make_model(num_hidden_layers=4, exit_layers=(1, 2), exit_head="norm")
    fitted = FittedExits(draft_vocab=torch.tensor([1, 2, 3]))
    clock = measure_clock(
        model, context=9, bandwidth=1e9, confidence=confidence, fitted=fitted, rows=rows, rounds=1
    )
    weights = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
    assert clock.block.bytes == pytest.approx(8 * (weights + 2 * 9 * 16))  # and 9 keys and values
    assert set(clock.block.seconds) == set(clock.keys_values.seconds) == set(TOKENS)
    assert set(clock.heads) == {1, 2, 4}
    assert set(clock.questions) == set(clock.drafts) == {1, 2}
    assert clock.drafts[1].flops == pytest.approx(clock.heads[1].flops * 3 / 13)
    if confidence == "saturation":
        assert clock.questions[1].flops == 0
    every = [clock.block, clock.keys_values, *clock.heads.values(), *clock.questions.values()]
    assert all(seconds > 0 for each in every for seconds in each.seconds.values())
    generation = generate(model, [1, 2], GenerateConfig(max_new_tokens=5, threshold=0.1))
    list(generation)
    assert clock.seconds(generation.work, 5) > 0


def test_a_gate_is_a_part_that_must_be_there(make_model):
    with pytest.raises(ConfigError, match="gate"):
        measure_clock(make_model(), context=3, bandwidth=1e9, confidence="gate", rounds=1)


def test_the_bandwidth_is_that_of_a_machine(monkeypatch):
    monkeypatch.setattr("offramp.evaluation.clock.BANDWIDTH_BYTES", 1 << 24)
    assert 1e8 < measure_bandwidth(rounds=1) < 1e13
