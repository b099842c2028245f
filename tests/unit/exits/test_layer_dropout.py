"""Layer dropout: rates against the paper's formula, draws that no process count can change."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.exits.layer_dropout import keep_mask, layer_dropout_rates
from offramp.exits.objective import ObjectiveConfig

ALL = slice(None)


def test_rates_equal_the_table():
    """L = 5: 2^(l/4) - 1 for l = 0..4, times 0.2."""
    config = ObjectiveConfig(layer_dropout=0.2)
    table = (0.0, 0.2 * 0.189207115, 0.2 * 0.414213562, 0.2 * 0.681792831, 0.2)
    for step in (1, 7, 10):
        assert layer_dropout_rates(config, step, 10, 5) == pytest.approx(table)


@pytest.mark.parametrize(
    ("step", "scale"), [(1, 0.0), (2, 0.189207115), (3, 0.414213562), (4, 0.681792831), (5, 1.0)]
)
def test_the_exponential_schedule_goes_from_0_to_1(step, scale):
    config = ObjectiveConfig(layer_dropout=0.3, layer_dropout_schedule="exponential")
    expected = (0.0, 0.3 * scale * (math.sqrt(2) - 1), 0.3 * scale)
    assert layer_dropout_rates(config, step, 5, 3) == pytest.approx(expected)


def test_nothing_is_dropped_by_default_nor_from_a_model_of_one_layer():
    assert layer_dropout_rates(ObjectiveConfig(), 3, 10, 4) == (0.0,) * 4
    assert layer_dropout_rates(ObjectiveConfig(layer_dropout=0.5), 3, 10, 1) == (0.0,)


def test_a_run_of_one_step_starts_the_exponential_schedule_at_0():
    config = ObjectiveConfig(layer_dropout=0.5, layer_dropout_schedule="exponential")
    assert layer_dropout_rates(config, 1, 1, 3) == (0.0,) * 3


@given(
    seed=st.integers(0, 2**32), step=st.integers(1, 10**6), layer=st.integers(1, 3), data=st.data()
)
def test_processes_together_draw_what_one_draws(seed, step, layer, data):
    batch_size = data.draw(st.integers(1, 40))
    cuts = data.draw(st.lists(st.integers(0, batch_size), max_size=4))
    bounds = sorted({0, batch_size, *cuts})
    draw = {"seed": seed, "step": step, "batch_size": batch_size}
    rates = (0.2, 0.5, 0.8)
    parts = [
        keep_mask(rates, layer, rows=slice(start, stop), **draw)
        for start, stop in itertools.pairwise(bounds)
    ]
    assert torch.equal(torch.cat(parts), keep_mask(rates, layer, rows=ALL, **draw))


def test_layers_steps_and_seeds_draw_apart():
    rates = (0.5, 0.5)
    masks = {
        tuple(keep_mask(rates, layer, seed=seed, step=step, rows=ALL, batch_size=64).tolist())
        for layer in (1, 2)
        for step in (1, 2)
        for seed in (0, 1)
    }
    assert len(masks) == 8


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_that_skips_is_the_rate(rate):
    n = 20_000
    kept = keep_mask((0.0, rate), 2, seed=0, step=1, rows=ALL, batch_size=n)
    skipped = 1 - kept.double().mean().item()
    assert abs(skipped - rate) < 4 * math.sqrt(rate * (1 - rate) / n)
    assert keep_mask((0.0, rate), 1, seed=0, step=1, rows=ALL, batch_size=n).all()


def test_a_higher_rate_skips_the_same_samples_and_more():
    few, many = (
        keep_mask((rate,), 1, seed=3, step=9, rows=ALL, batch_size=200) for rate in (0.3, 0.6)
    )
    assert not (many & ~few).any()
    assert many.sum() < few.sum()


def test_rows_beyond_the_batch_are_a_defect():
    with pytest.raises(AssertionError):
        keep_mask((0.5,), 1, seed=0, step=1, rows=slice(0, 5), batch_size=4)
