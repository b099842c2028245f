"""With a cache, in whatever portions the tokens come, the logits are those without one."""

import pytest
import torch
from torch.testing import assert_close

from offramp.models.base import Step


def decode(model, ids, cache, *, start=0, rows=None):
    """Logits of these tokens, which stand at start, start + 1, ... of every row."""
    positions = torch.arange(start, start + ids.shape[1])[None]
    step = Step(positions=positions, cache=cache, rows=rows)
    h = model.run_layers(model.embed(ids, step=step), 0, model.num_layers, step=step)
    return model.unembed(h, model.num_layers)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(
    "portions",
    [[9], [5, 1, 1, 1, 1], [1] * 9, [3, 4, 2], [1, 8]],
    ids=["one call", "prefill then tokens", "tokens", "chunks", "token then chunk"],
)
def test_cached_logits_equal_uncached(model, make_ids, portions):
    ids = make_ids(2, 9)
    cache = model.make_cache(2, capacity=9)
    parts, start = [], 0
    for length in portions:
        parts.append(decode(model, ids[:, start : start + length], cache, start=start))
        start += length
    assert_close(torch.cat(parts, dim=1), model(ids))
    assert (cache.lengths == 9).all()


def test_a_larger_capacity_changes_nothing(model, make_ids):
    ids = make_ids(2, 6)
    cache = model.make_cache(2, capacity=50)
    decode(model, ids[:, :4], cache)
    assert_close(decode(model, ids[:, 4:], cache, start=4), model(ids)[:, 4:])


def test_a_subset_of_the_rows_goes_on_as_in_the_full_batch(model, make_ids):
    ids = make_ids(4, 10)
    cache = model.make_cache(4, capacity=10)
    decode(model, ids[:, :5], cache)
    full = model(ids)
    rows = torch.tensor([2, 0])
    for t in (5, 6):
        assert_close(
            decode(model, ids[rows, t : t + 1], cache, start=t, rows=rows), full[rows, t : t + 1]
        )
    last = torch.tensor([2])
    assert_close(decode(model, ids[last, 7:], cache, start=7, rows=last), full[last, 7:])
    assert cache.lengths.tolist() == [[7, 5, 10, 5]] * model.num_layers
    others = torch.tensor([1, 3])  # the rows that waited are untouched
    assert_close(decode(model, ids[others, 5:], cache, start=5, rows=others), full[others, 5:])


def test_after_a_crop_other_tokens_follow(model, make_ids):
    kept, dropped, others = make_ids(2, 4), make_ids(2, 5, seed=1), make_ids(2, 3, seed=2)
    cache = model.make_cache(2, capacity=9)
    decode(model, kept, cache)
    decode(model, dropped, cache, start=4)
    cache.crop(4)
    assert (cache.lengths == 4).all()
    expected = model(torch.cat((kept, others), dim=1))[:, 4:]
    assert_close(decode(model, others[:, :1], cache, start=4), expected[:, :1])
    assert_close(decode(model, others[:, 1:], cache, start=5), expected[:, 1:])
    assert (cache.lengths == 7).all()


def test_upper_layers_may_be_filled_later_in_a_batch(model, make_ids):
    """Tokens 4 and 5 leave after layer 1; token 6 goes deep, so they are filled in first."""
    ids = make_ids(2, 7)
    cache = model.make_cache(2, capacity=7)
    decode(model, ids[:, :4], cache)
    waiting = []
    for t in (4, 5, 6):
        step = Step(positions=torch.tensor([[t]]), cache=cache)
        h = model.embed(ids[:, t : t + 1], step=step)
        waiting.append(model.run_layers(h, 0, 1, step=step))
    assert cache.lengths[:, 0].tolist() == [7, 4, 4]
    step = Step(positions=torch.arange(4, 7)[None], cache=cache)
    h = model.run_layers(torch.cat(waiting, dim=1), 1, 3, step=step)
    assert_close(model.unembed(h, 3), model(ids)[:, 4:])


def test_a_full_cache_is_an_error_and_stays_as_it_was(model, make_ids):
    ids = make_ids(1, 5)
    cache = model.make_cache(1, capacity=4)
    decode(model, ids[:, :4], cache)
    before = cache.keys.clone()
    with pytest.raises(ValueError, match="holds 4 positions, got 5"):
        decode(model, ids[:, 4:], cache, start=4)
    assert torch.equal(cache.keys, before)
    assert (cache.lengths == 4).all()


def test_a_vocabulary_slice_is_a_slice_of_the_logits(model, make_ids):
    h = model.embed(make_ids(2, 3), step=Step(positions=torch.arange(3)[None]))
    some = torch.tensor([7, 0, 12])
    assert_close(model.unembed(h, 1, vocab=some), model.unembed(h, 1)[..., some])
