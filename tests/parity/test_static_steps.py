"""The static steps of a GPU, which run on a CPU as they are, equal blocks and whole sequences."""

import copy
import math
import weakref

import pytest
import torch
from torch.testing import assert_close

from offramp.models.base import Step, whole_step
from offramp.models.kv_cache import KVCache
from offramp.models.native.static import caches

MODELS = {
    "pre-norm": {"num_key_value_heads": 2},
    "post-norm": {"norm": "post", "num_key_value_heads": 4},
    "shared keys and values": {"num_hidden_layers": 4, "kv_source_layer": 2},
    "one kv head": {"num_key_value_heads": 1},
}
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.15}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=[False, True], ids=["as it is", "recorded"])
def static(request, graphs):
    """Return what makes a model use the static steps."""

    def use(model):
        model.few_tokens.use_static = True
        model.few_tokens.static.capture = request.param
        return model

    yield use
    if request.param:
        assert graphs.made > 0
        assert graphs.replayed > 0


def close(got, wanted):
    bound = BOUNDS[wanted.dtype]
    assert_close(got, wanted, rtol=0, atol=bound * max(1.0, float(wanted.abs().max())))


def states(model, ids):
    """The states at each layer of whole sequences."""
    layers = range(model.num_layers + 1)
    return dict(model.states_at(ids, layers, step=whole_step(ids)))


def step_of(start, stop, cache, **fields):
    return Step(positions=torch.arange(start, stop)[None], cache=cache, end=stop, **fields)


def cache_of(model, rows, capacity):
    """A cache of exactly this capacity."""
    return KVCache(batch_size=rows, capacity=capacity, **model._form)


def decoded(model, ids, parts, cache, *, cuts=()):
    """The states after the last layer, of calls that end at ``parts`` and between ``cuts``."""
    found, start = [], 0
    for stop in parts:
        step = step_of(start, stop, cache)
        h, done = model.embed(ids[:, start:stop], step=step), 0
        for cut in (*cuts, model.num_layers):
            h, done = model.run_layers(h, done, cut, step=step), cut
        found.append(h)
        start = stop
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_calls_of_any_size_equal_whole_sequences(make_model, make_ids, static, name, dtype, batch):
    model = static(make_model(dtype=dtype, **MODELS[name]))
    parts = (1, 5, 8, 9, 12)  # 3 tokens, which are padded, after 4
    ids = make_ids(batch, parts[-1])
    got = decoded(model, ids, parts, model.make_cache(batch, 12), cuts=(1,))
    close(got, states(model, ids)[model.num_layers])
    if batch == 1:
        for layer in (1, model.num_layers):
            h = states(model, ids)[layer][:, :5]
            wanted = model.unembed(states(model, ids)[layer], layer)[:, :5]
            close(model.unembed(h, layer), wanted)


@pytest.mark.parametrize("capacity", [20, 256, 257, 258, 300])
def test_buckets_of_slots_have_no_seam(make_model, make_ids, static, capacity):
    """Single tokens across each border, up to the last position of the cache."""
    model = static(make_model(max_position_embeddings=300))
    first = max(1, min(capacity, 256) - 3)
    parts = [first, *range(first + 1, capacity + 1)][: 1 + 8]
    if capacity > parts[-1]:
        parts += [capacity - 2, capacity]
    ids = make_ids(1, parts[-1])
    got = decoded(model, ids, parts, cache_of(model, 1, capacity))
    close(got, states(model, ids)[model.num_layers])


def test_a_cache_of_numbers_that_are_not_finite_changes_nothing(make_model, make_ids, static):
    model = static(make_model(num_key_value_heads=2))
    ids = make_ids(2, 9)
    wanted = states(model, ids)[3]
    cache = model.make_cache(2, 16)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.inf)
    close(decoded(model, ids, (1, 2, 5, 8, 9), cache), wanted)
    rows = model.make_cache(4, 16)
    rows.keys.fill_(math.nan)
    rows.values.fill_(math.nan)
    for at in range(9):
        step = step_of(at, at + 1, rows, rows=torch.tensor([3, 1]))
        got = model.run_layers(model.embed(ids[:, at : at + 1], step=step), 0, 3, step=step)
        close(got, wanted[:, at : at + 1])
    assert rows.keys[:, [0, 2], :, :16].isnan().all()


def test_rows_may_be_some_others_twice_and_in_any_order(make_model, make_ids, static):
    model = static(make_model(num_key_value_heads=2))
    ids = make_ids(4, 8)
    wanted = states(model, ids)[3]
    cache = model.make_cache(4, 8)
    random = torch.Generator().manual_seed(3)
    done = [0, 0, 0, 0]
    while min(done) < 8:
        rows, places = [], []
        for row in torch.randperm(4, generator=random).tolist():
            more = min(8 - done[row], int(torch.randint(0, 3, (), generator=random)))
            rows += [row] * more
            places += range(done[row], done[row] + more)
            done[row] += more
        if not rows:
            continue
        at, where = torch.tensor(rows), torch.tensor(places)[:, None]
        step = Step(positions=where, cache=cache, rows=at, end=max(places) + 1)
        h = model.embed(ids[at[:, None], where], step=step)
        close(model.run_layers(h, 0, 3, step=step), wanted[at[:, None], where])
    assert cache.lengths.tolist() == [[8] * 4] * 3


@pytest.mark.parametrize("name", MODELS)
def test_inactive_tokens_keep_their_state_and_leave_keys_and_values(
    make_model, make_ids, static, name
):
    model = static(make_model(**MODELS[name]))
    ids = make_ids(2, 6)
    active = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 1]]).bool()
    h = model.embed(ids, step=whole_step(ids))
    found = []
    for use_static in (True, False):
        model.few_tokens.use_static = use_static
        cache = model.make_cache(2, 6)
        parts = []
        for start, stop in ((0, 3), (3, 4), (4, 6)):
            step = step_of(start, stop, cache)
            part = slice(start, stop)
            parts.append(
                model.run_layers(h[:, part], 0, model.num_layers, step=step, active=active[:, part])
            )
        found.append((torch.cat(parts, dim=1), cache))
    (got, ours), (wanted, theirs) = found
    close(got, wanted)
    close(ours.keys[..., :6, :], theirs.keys[..., :6, :])
    close(ours.values[..., :6, :], theirs.values[..., :6, :])
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.equal(got[~active], h[~active])


@pytest.mark.parametrize("name", MODELS)
def test_projecting_keys_and_values_equals_the_blocks(make_model, make_ids, static, name):
    model = static(make_model(**MODELS[name]))
    ids = make_ids(1, 5)
    h = model.embed(ids, step=whole_step(ids))
    caches = []
    for use_static in (True, False):
        model.few_tokens.use_static = use_static
        cache = model.make_cache(1, 8)
        model.project_kv(h, 1, model.num_layers, step=step_of(0, 5, cache))
        caches.append(cache)
    ours, theirs = caches
    close(ours.keys[..., :8, :], theirs.keys[..., :8, :])
    close(ours.values[..., :8, :], theirs.values[..., :8, :])
    assert torch.equal(ours.lengths, theirs.lengths)


@pytest.mark.parametrize("kind", ["shared", "norm", "adapter", "full", "specialist"])
def test_heads_equal_those_of_whole_sequences(make_model, static, kind):
    model = static(make_model(exit_layers=(1,), exit_head=kind))
    for parameter in model.exits.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    vocab = torch.tensor([7, 2, 11])
    for count in (1, 3, 16, 2):
        h = torch.randn(1, count, 16, dtype=torch.float64)
        for layer in (1, 3):
            wanted = model.unembed(h.repeat(1, 17, 1), layer)[:, :count]
            close(model.unembed(h, layer), wanted)
            close(model.unembed(h, layer, vocab=vocab), wanted[..., vocab])
    h = torch.randn(1, 2, 16, dtype=torch.float64)
    before = model.unembed(h, 1, vocab=vocab)
    model.lm_head.weight.mul_(2)  # in place: the rows of the vocabulary follow
    for head in model.exits.values():
        if head.lm_head is not None:
            head.lm_head.weight.mul_(2)
    close(model.unembed(h, 1, vocab=vocab), 2 * before)
    close(model.unembed(h, 3), model.unembed(h.repeat(1, 17, 1), 3)[:, :2])
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.5  # new places
    close(model.unembed(h, 1), model.unembed(h.repeat(1, 17, 1), 1)[:, :2])


def test_two_caches_take_turns(make_model, make_ids, static):
    model = static(make_model())
    ids = make_ids(2, 6)
    wanted = states(model, ids)[3]
    caches = [model.make_cache(1, 6), model.make_cache(1, 9)]
    for at in range(6):
        for row, cache in enumerate(caches):
            step = step_of(at, at + 1, cache)
            h = model.embed(ids[row : row + 1, at : at + 1], step=step)
            close(model.run_layers(h, 0, 3, step=step), wanted[row : row + 1, at : at + 1])


def test_weights_that_change_in_place_or_move_are_followed(make_model, make_ids, static):
    model = static(make_model())
    ids = make_ids(1, 6)

    def check():
        wanted = states(model, ids)[model.num_layers]
        cache = model.make_cache(1, 6)
        close(decoded(model, ids, (1, 2, 4, 6), cache), wanted.to(model.dtype))
        return cache

    kept = check()
    for parameter in model.parameters():
        parameter.mul_(1.1)
    cache_before = copy.copy(kept)
    kept.crop(0)
    close(decoded(model, ids, (1, 2, 4, 6), kept), states(model, ids)[3])  # the same graphs
    assert cache_before.memo is kept.memo
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.1  # new places
    check()
    model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}, assign=True)
    check()
    model.float()
    check()
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    model = twin
    check()


def test_training_goes_on_after_static_steps(make_model, make_ids, static):
    """The blocks' parameters are views of fused ones: names, gradients and saving stay."""
    model, plain = static(make_model()), make_model()
    ids = make_ids(1, 6)
    decoded(model, ids, (1, 3, 6), model.make_cache(1, 6))
    steps = []
    for each in (model, plain):
        with torch.enable_grad():
            optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
            each(ids).logsumexp(-1).sum().backward()
            optimizer.step()
        steps.append(each.state_dict())
    assert steps[0].keys() == steps[1].keys()
    for name, tensor in steps[0].items():
        assert torch.equal(tensor, steps[1][name])
    close(decoded(model, ids, (1, 3, 6), model.make_cache(1, 6)), states(plain, ids)[3])


def test_quantised_weights_run_in_the_blocks(make_model, make_ids, monkeypatch):
    from offramp.models.native.quantise import quantised

    model = quantised(make_model(dtype=torch.float32, hidden_size=32), "int8")
    ids = make_ids(1, 6)
    wanted = states(model, ids)[3]
    model.few_tokens.use_static = True
    monkeypatch.setattr(model.few_tokens.static, "run", None)
    monkeypatch.setattr(model.few_tokens.static, "logits", None)
    got = decoded(model, ids, (1, 3, 6), model.make_cache(1, 6))
    assert_close(got, wanted, rtol=0, atol=1e-3)
    assert model.unembed(got[:, :2], 3).shape == (1, 2, 13)
    assert not model.fills_beside(2)


def test_a_wrong_end_or_position_leads_to_no_other_row(make_model, static):
    """On a GPU nobody reads the positions, so they may be anything."""
    model = static(make_model())
    cache = cache_of(model, 3, 8)
    few, tables = model.few_tokens.static, (model.get_buffer("cos"), model.get_buffer("sin"))
    h = torch.randn(2, 1, 16, dtype=torch.float64)
    for positions, rows, end in (
        ([[8], [99]], [1, 1], 3),
        ([[-5], [1 << 40]], [1, 1], 8),
        ([[7], [2]], [1, 1], 1),
        ([[2], [-1]], [1, 77], 400),
    ):
        step = Step(positions=torch.tensor(positions), rows=torch.tensor(rows), cache=cache)
        out = few.run(h, 0, 3, step=step, end=end, tables=tables)
        assert out.isfinite().all()
        assert cache.keys[:, 0, :, :8].abs().sum() == 0
    assert cache.keys[:, 1, :, 2].abs().sum() > 0


@pytest.fixture
def model(make_model):
    model = make_model()
    model.few_tokens.use_static = model.few_tokens.static.capture = True
    return model


def test_graphs_are_few(model, make_ids, graphs):
    ids = make_ids(1, 12)
    decoded(model, ids, range(1, 13), model.make_cache(1, 12))
    assert graphs.made == 1
    assert graphs.replayed == 12
    decoded(model, ids, (3, 7, 12), model.make_cache(1, 12))
    assert graphs.made == 3  # 4 tokens (also for 3), 8 for 5


def test_the_next_cache_of_the_shape_takes_the_memory_and_the_graphs(model, make_ids, graphs):
    ids, parts = make_ids(1, 12), (1, 2, 6, 12)
    wanted = states(model, ids)[3]
    cache = model.make_cache(1, 12)
    decoded(model, ids, parts, cache)
    gone, place, made = weakref.ref(cache), cache.keys.data_ptr(), graphs.made
    cache.keys.fill_(math.nan)
    del cache
    assert gone() is None  # at once, and not when garbage is collected
    with torch.inference_mode():
        cache = model.make_cache(1, 200)
        assert (cache.keys.data_ptr(), cache.capacity) == (place, 256)
        assert cache.keys.abs().sum() == cache.lengths.sum() == 0
        close(decoded(model, ids, parts, cache), wanted)
        assert graphs.made == made
    other = model.make_cache(1, 12)  # the memory is in use
    assert other.keys.data_ptr() != place
    close(decoded(model, ids, parts, other), wanted)
    assert graphs.made > made


def test_the_memory_of_a_cache_is_freed_for_one_of_another_shape(model, make_ids, graphs):
    ids = make_ids(1, 12)
    cache = model.make_cache(1, 12)
    decoded(model, ids, (1, 12), cache)
    keys = weakref.ref(cache.keys)
    del cache
    assert keys() is not None
    model.make_cache(2, 12)
    assert keys() is None


def test_the_memory_of_a_large_cache_is_freed_at_once(model, make_ids, graphs, monkeypatch):
    monkeypatch.setattr(caches, "KEPT_BYTES", 1000)
    ids = make_ids(1, 12)
    cache = model.make_cache(1, 12)
    decoded(model, ids, (1, 12), cache)
    keys = weakref.ref(cache.keys)
    del cache
    assert keys() is None


def test_weights_that_are_replaced_get_new_graphs(model, make_ids, graphs):
    ids = make_ids(1, 12)
    decoded(model, ids, (1, 12), model.make_cache(1, 12))
    made = graphs.made
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.1
    wanted = states(model, ids)[3]
    close(decoded(model, ids, (1, 12), model.make_cache(1, 12)), wanted)
    assert graphs.made == 2 * made


def test_sharded_weights_run_in_the_blocks(model):
    """Their addresses change, so no graph may hold them."""

    class Shard(torch.nn.Parameter):
        pass

    h = torch.zeros(1, 2, 16, dtype=torch.float64)
    assert model.few_tokens.of(h) is model.few_tokens.static
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = Shard(projection.weight.data)
    assert model.few_tokens.of(h) is None
    assert not model.fills_beside(2)
