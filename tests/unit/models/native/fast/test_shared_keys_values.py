"""Fast steps of models whose upper blocks share the keys and values of one layer of the cache.

Each test runs with the compiled kernels (float32, bfloat16), if they were built, and with
PyTorch (float64).
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from offramp.models.base import FEW_TOKENS, Step
from offramp.models.native.fast import kernels

LAYERS, SOURCES = 5, (1, 2, 4)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.25}
needs_kernels = pytest.mark.skipif(kernels._compiled is None, reason="the kernels were not built")
every_source = pytest.mark.parametrize("source", SOURCES)
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
every_norm = pytest.mark.parametrize("norm", ["pre", "post"])


@pytest.fixture
def make(make_model):
    """Make a model with a source of keys and values, by default in float32."""

    def with_source(source, *, dtype=torch.float32, **fields):
        shape = {"hidden_size": 64, "intermediate_size": 48, "num_key_value_heads": 2}
        shape |= {"num_hidden_layers": LAYERS, "kv_source_layer": source}
        shape |= {"upper_intermediate_size": 80 if source < LAYERS - 1 else None}
        model = make_model(dtype=dtype, **(shape | fields))
        cache = model.make_cache(3, capacity=7)
        assert cache.keys.shape[0] == cache.values.shape[0] == len(cache.lengths) == source + 1
        return model

    return with_source


def call(model, cache, ids, first, *, cuts=(0, LAYERS), rows=None, active=None):
    """Run all blocks on tokens that stand from position ``first`` on, with stops in between."""
    step = Step(positions=torch.arange(first, first + ids.shape[1])[None], cache=cache, rows=rows)
    h = model.embed(ids, step=step)
    for start, stop in pairwise(cuts):
        h = model.run_layers(h, start, stop, step=step, active=active)
    return h


def assert_same(cache, other):
    for name in ("keys", "values", "lengths"):
        assert torch.equal(getattr(cache, name), getattr(other, name)), name


@every_source
@every_dtype
@every_norm
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.inference_mode()
def test_steps_with_a_cache_are_as_the_whole_sequence(
    make, make_ids, source, dtype, norm, kv_heads
):
    """A long prompt, then a few tokens, then one by one: more than 64 positions."""
    model = make(source, dtype=dtype, norm=norm, num_key_value_heads=kv_heads)
    ids, cache, found, at = make_ids(2, 82), model.make_cache(2, capacity=82), [], 0
    for portion in (70, FEW_TOKENS // 2, 3, 1):
        found.append(call(model, cache, ids[:, at : at + portion], at))
        at += portion
    assert cache.lengths.tolist() == [[82, 82]] * (source + 1)
    double = model.double()
    step = Step(positions=torch.arange(82)[None])
    whole = double.run_layers(double.embed(ids, step=step), 0, LAYERS, step=step)
    assert_close(torch.cat(found, 1).double(), whole, rtol=0, atol=TOLERANCE[dtype])


@every_source
@every_norm
@torch.inference_mode()
def test_steps_are_as_the_whole_sequence_without_compiled_kernels(
    make, make_ids, monkeypatch, source, norm
):
    monkeypatch.setattr(kernels, "_compiled", None)
    model = make(source, norm=norm)
    ids, cache = make_ids(2, 9), model.make_cache(2, capacity=9)
    found = [call(model, cache, ids[:, :5], 0), call(model, cache, ids[:, 5:], 5)]
    step = Step(positions=torch.arange(9)[None])
    whole = model.run_layers(model.embed(ids, step=step), 0, LAYERS, step=step)
    assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-4)


@every_source
@every_dtype
@torch.inference_mode()
def test_rows_may_be_chosen_and_come_twice(make, make_ids, source, dtype):
    """Two tokens of one row, a row each, and a row that is not there; as tokens of one call."""
    model = make(source, dtype=dtype)
    ids = make_ids(3, 8)
    one, other = (model.make_cache(3, capacity=8) for _ in range(2))
    for cache in (one, other):
        call(model, cache, ids[:, :6], 0)
    rows, places = torch.tensor([2, 0, 2]), torch.tensor([[6], [6], [7]])
    step = Step(positions=places, cache=one, rows=rows)
    h = model.run_layers(model.embed(ids[rows[:, None], places], step=step), 0, LAYERS, step=step)
    assert one.lengths.tolist() == [[7, 6, 8]] * (source + 1)
    last = call(model, other, ids[2:, 6:], 6, rows=rows[:1])
    first = call(model, other, ids[:1, 6:7], 6, rows=rows[1:2])
    expected = torch.stack((last[0, 0], first[0, 0], last[0, 1]))
    exact = dtype != torch.float64
    assert_close(h[:, 0], expected, rtol=0, atol=0 if exact else 1e-10)
    assert torch.equal(one.lengths, other.lengths)
    assert_close(one.keys, other.keys, rtol=0, atol=0 if exact else 1e-10)


@every_source
@every_dtype
@every_norm
@pytest.mark.parametrize("active", [None, "0011", "1100", "0101", "0000"])
@torch.inference_mode()
def test_blocks_one_by_one_have_the_bits_of_one_call(make, make_ids, source, dtype, norm, active):
    model = make(source, dtype=dtype, norm=norm)
    ids = make_ids(1, 7)
    goes = active and torch.tensor([[each == "1" for each in active]])
    caches, said = [], []
    for cuts in (
        (0, LAYERS),
        tuple(range(LAYERS + 1)),
        *((0, cut, LAYERS) for cut in range(1, LAYERS)),
    ):
        cache = model.make_cache(1, capacity=8)
        call(model, cache, ids[:, :3], 0)
        said.append(call(model, cache, ids[:, 3:], 3, cuts=cuts, active=goes))
        caches.append(cache)
    for cache, h in zip(caches, said, strict=True):
        assert torch.equal(h, said[0])
        assert_same(cache, caches[0])
    assert caches[0].lengths.tolist() == [[7]] * (source + 1)


@every_source
@every_dtype
@every_norm
@pytest.mark.parametrize("active", ["0011", "1100", "0101", "1011", "0000", "1111"])
@pytest.mark.parametrize("by_row", [False, True], ids=["in one row", "a row each"])
@torch.inference_mode()
def test_tokens_that_are_done_leave_keys_and_values_up_to_the_source(
    make, make_ids, source, dtype, norm, active, by_row
):
    """In whatever order they stand: as if each block ran for all and some states were put back."""
    model = make(source, dtype=dtype, norm=norm)
    ids = make_ids(4, 1) if by_row else make_ids(1, 4)
    goes = torch.tensor([each == "1" for each in active]).view(ids.shape)
    one, other = (model.make_cache(len(ids), capacity=5) for _ in range(2))
    h = call(model, one, ids, 0, cuts=(0,))
    got = call(model, one, ids, 0, active=goes)
    step = Step(positions=torch.arange(ids.shape[1])[None], cache=other)
    expected = h
    for layer in range(LAYERS):
        out = model.run_layers(expected, layer, layer + 1, step=step)
        expected = torch.where(goes[..., None], out, expected)
    assert torch.equal(got[~goes], h[~goes])
    atol = 1e-9 if dtype == torch.float64 else 0
    assert_close(got, expected, rtol=0, atol=atol)
    for name in ("keys", "values", "lengths"):
        assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=atol)


@needs_kernels
@every_source
@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_token_gets_the_same_bits_in_any_company(make, make_ids, source, norm, dtype):
    """In a batch by two threads, beside tokens that are done, with drafts, and alone."""
    model = make(source, dtype=dtype, norm=norm, intermediate_size=512)
    ids = make_ids(4, 70)
    together, batch = model.make_cache(4, capacity=80), []
    call(model, together, ids[:, :66], 0)
    alone = [model.make_cache(1, capacity=80) for _ in range(4)]
    for row, cache in enumerate(alone):
        for name in ("keys", "values", "lengths"):
            getattr(cache, name)[:] = getattr(together, name)[:, row : row + 1]
    before, threads = together.keys.clone(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        batch = [call(model, together, ids[:, at : at + 1], at) for at in range(66, 70)]
    finally:
        torch.set_num_threads(threads)
    for row, cache in enumerate(alone):
        steps = [call(model, cache, ids[row : row + 1, at : at + 1], at) for at in range(66, 70)]
        assert torch.equal(torch.cat(steps, 1), torch.cat(batch, 1)[row : row + 1])
        assert torch.equal(cache.keys[:, 0], together.keys[:, row])
        cache.keys[:] = before[:, row : row + 1]
        drafts = call(model, cache, ids[row : row + 1, 66:], 66)
        assert torch.equal(drafts, torch.cat(batch, 1)[row : row + 1])
    together.keys[:] = before
    goes = torch.tensor([[False], [True], [False], [True]])
    some = call(model, together, ids[:, 66:67], 66, active=goes)
    assert torch.equal(some[goes], batch[0][goes])


@every_source
@every_dtype
@torch.inference_mode()
def test_keys_and_values_alone_end_at_the_source(make, make_ids, source, dtype):
    """They are those of whole blocks, and a call wholly above the source writes nothing."""
    model = make(source, dtype=dtype)
    ids = make_ids(3, 4)
    step = Step(positions=torch.arange(4)[None], cache=model.make_cache(3, capacity=6))
    h = model.embed(ids, step=step)
    for layer in range(LAYERS):
        alone = replace(step, cache=model.make_cache(3, capacity=6))
        model.project_kv(h, layer, LAYERS, step=alone)
        written = alone.cache.lengths.ne(0).any(dim=1).tolist()
        assert written == [layer <= below for below in range(source + 1)]
        assert alone.cache.keys.flatten(1).ne(0).any(dim=1).tolist() == written
        if layer <= source:
            above = model.run_layers(h, layer, layer + 1, step=step)
            # float64 has no kernels of ours, and a library's products of other shapes may round
            # otherwise
            error = 1e-12 if dtype == torch.float64 else 0.0
            for name in ("keys", "values"):
                ours, theirs = (getattr(each.cache, name)[layer] for each in (alone, step))
                torch.testing.assert_close(ours, theirs, rtol=0.0, atol=error)
            h = above
    for start in range(source + 1, LAYERS):
        kept = step.cache.keys.clone(), step.cache.lengths.clone()
        model.project_kv(h + 1, start, LAYERS, step=step)
        none = torch.zeros(3, 4, dtype=torch.bool)
        assert torch.equal(model.run_layers(h, start, LAYERS, step=step, active=none), h)
        model.run_layers(h + 1, start, LAYERS, step=step)
        assert torch.equal(step.cache.keys, kept[0])
        assert torch.equal(step.cache.lengths, kept[1])


@every_source
@torch.inference_mode()
def test_blocks_of_several_precisions_do_without_the_call_for_all(make, make_ids, source):
    """As after a part of the model was converted: each product is a call of its own."""
    model = make(source)
    ids = make_ids(2, 5)
    expected = call(model, model.make_cache(2, capacity=5), ids, 0)
    model.model.layers[1].mlp.bfloat16()
    model.model.layers[1].mlp.float()
    changed = model.model.layers[LAYERS - 1].mlp.down_proj
    changed.weight.data = changed.weight.data.bfloat16()
    cache = model.make_cache(2, capacity=5)
    got = call(model, cache, ids, 0)
    assert model.few_tokens.fast.weights.of(cache).kernel is None
    assert_close(got, expected, rtol=0, atol=0.1)
    assert cache.lengths.tolist() == [[5, 5]] * (source + 1)
