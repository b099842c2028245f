"""The end of a step's positions, which a caller may state so that a GPU need not be read."""

import pytest
import torch

from offramp.errors import ConfigError
from offramp.models.base import Step
from offramp.models.checks import checked_end

META = torch.device("meta")


def step(positions, **fields):
    return Step(positions=torch.tensor(positions), **fields)


def test_an_end_that_is_right_changes_nothing(make_model):
    cache = make_model().make_cache(1, 8)
    h = torch.zeros(1, 2, 16)
    for end in (None, 6):
        assert checked_end(step([[4, 5]], cache=cache, end=end), h, longest=99) == 6


@pytest.mark.parametrize("end", [5, 7, 0, -1])
def test_an_end_that_is_wrong_is_named_on_a_cpu(make_model, end):
    model = make_model()
    cache = model.make_cache(1, 8)
    h = torch.zeros(1, 2, 16, dtype=torch.float64)
    with pytest.raises(ConfigError, match=f"^end: expected the largest position .*6, got {end}$"):
        model.run_layers(h, 0, 3, step=step([[4, 5]], cache=cache, end=end))


def on_meta(capacity, **fields):
    """A step on a device of which nothing can be read, as nothing should be of a GPU."""
    from offramp.models.kv_cache import KVCache

    cache = KVCache(
        num_layers=1, batch_size=2, num_heads=1, head_dim=2, capacity=capacity, device=META
    )
    positions = torch.zeros(2, 1, dtype=torch.long, device=META)
    return Step(positions=positions, cache=cache, **fields)


def test_positions_and_rows_of_another_device_are_not_read_beside_an_end():
    h = torch.zeros(2, 1, 4, device=META)
    rows = torch.zeros(2, dtype=torch.long, device=META)
    assert checked_end(on_meta(8, end=8, rows=rows), h, longest=99) == 8
    assert checked_end(on_meta(8, end=3), h, longest=99) == 3
    with pytest.raises((RuntimeError, NotImplementedError)):
        checked_end(on_meta(8), h, longest=99)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"end": 9}, "the cache holds 8 positions, got 9"),
        ({"end": 100}, "sequence length: expected at most 99"),
        ({"end": 0}, "end: expected at least 1, got 0"),
        ({"end": 3, "rows": torch.zeros(2, device=META).int()}, "rows: expected"),
    ],
)
def test_an_end_must_fit_the_model_and_the_cache(fields, message):
    h = torch.zeros(2, 1, 4, device=META)
    with pytest.raises(ConfigError, match=message):
        checked_end(on_meta(8, **fields), h, longest=99)
