"""Prompts on a CPU: attention of many tokens is that of PyTorch, and so is a whole prompt."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from offramp.errors import ConfigError
from offramp.models.base import FEW_TOKENS, Step
from offramp.models.native.fast import kernels
from offramp.models.native.quantise import quantised
from offramp.models.native.quantised import quantise_weight

pytestmark = pytest.mark.skipif(kernels._compiled is None, reason="the kernels were not built")

DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"), [(8, 2, 2), (24, 6, 2), (64, 9, 3), (104, 1, 1), (256, 7, 1)]
)
@pytest.mark.parametrize(("first", "tokens"), [(0, 17), (0, 64), (3, 65), (70, 130), (190, 48)])
def test_attention_of_a_text_is_pytorchs(first, tokens, size, heads, kv_heads, dtype):
    end, capacity = first + tokens, 240
    keys = numbers(2, 2, kv_heads, capacity, size, seed=1, dtype=dtype)
    values = numbers(2, 2, kv_heads, capacity, size, seed=2, dtype=dtype)
    before = keys.clone(), values.clone()
    lengths = torch.zeros(2, 2, dtype=torch.long)
    angles = numbers(capacity, size // 2, seed=3)
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=1)
    slots = torch.arange(first, end)
    cache = kernels.KernelCache(keys, values, lengths, cos, sin)
    at = kernels.CachedTokens(cache, slots=slots, rows=torch.ones(tokens, dtype=torch.long))
    qkv = numbers(tokens, (heads + 2 * kv_heads) * size)
    split = qkv.clone().view(tokens, -1, size).transpose(0, 1)
    q, k, v = split.split((heads, kv_heads, kv_heads))

    got = at.attend(qkv, 1).view(tokens, heads, size).transpose(0, 1)

    assert_close(keys[1, 1, :, slots], rotated(k, cos[slots], sin[slots]).to(dtype))
    assert torch.equal(values[1, 1, :, slots], v.to(dtype))
    assert lengths.tolist() == [[0, 0], [0, end]]
    for now, then in zip((keys, values), before, strict=True):
        then[1, 1, :, slots] = now[1, 1, :, slots]
        assert torch.equal(now, then)  # nothing else was written
    mask = torch.arange(end) <= slots[:, None]
    seen = [
        each[1, 1, :, :end].float().repeat_interleave(heads // kv_heads, 0)
        for each in (keys, values)
    ]
    wanted = F.scaled_dot_product_attention(
        rotated(q, cos[slots], sin[slots]), *seen, attn_mask=mask
    )
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_large_scores_and_what_is_no_number():
    tokens, size = 40, 16
    cos, sin = torch.ones(tokens, size), torch.zeros(tokens, size)
    cache = torch.zeros(1, 1, 1, tokens, size)
    lengths, at = torch.zeros(1, 1, dtype=torch.long), torch.arange(tokens)
    held = kernels.KernelCache(cache, cache.clone(), lengths, cos, sin)
    places = kernels.CachedTokens(held, slots=at, rows=torch.zeros_like(at))
    qkv = numbers(tokens, 3 * size) * 1e3
    q, k, v = qkv.clone().view(tokens, 3, 1, size).permute(1, 2, 0, 3)
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)[0]
    assert_close(places.attend(qkv.clone(), 0).double(), wanted, rtol=1e-3, atol=1.0)
    qkv[7, 0] = torch.nan
    found = places.attend(qkv, 0).isnan().all(dim=1)
    assert found.tolist() == [n == 7 for n in range(tokens)]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("of", DTYPES)
@pytest.mark.parametrize("inputs", [1, 8, 29, 333])
def test_what_a_product_of_many_tokens_multiplies(inputs, of, to):
    x, norm = numbers(70, 2 * inputs, dtype=of), numbers(inputs, seed=1, dtype=of)
    wide = x.float()
    gated = F.silu(wide[:, :inputs]) * wide[:, inputs:]
    assert_close(
        kernels.prepared(x, to), gated.to(to), rtol=1e-2 if to == DTYPES[1] else 1e-5, atol=1e-6
    )
    half = x[:, :inputs]  # not contiguous
    wanted = F.rms_norm(half.float(), (inputs,), norm.float(), 1e-5).to(to)
    got = kernels.prepared(half, to, norm=norm, eps=1e-5)
    assert_close(got, wanted, rtol=1e-2 if to == DTYPES[1] else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_norm_of_another_precision_is_converted(dtype):
    x, norm = numbers(4, 8), numbers(8, seed=1, dtype=dtype)
    wanted = F.rms_norm(x, (8,), norm.float(), 1e-5)
    assert_close(kernels.prepared(x, torch.float32, norm=norm, eps=1e-5), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_nothing_is_the_residual(dtype):
    x, weight, residual = numbers(20, 0), numbers(8, 0, dtype=dtype), numbers(20, 8)
    assert torch.equal(kernels.linear(x, weight, residual=residual), residual)
    assert torch.equal(kernels.linear(x, weight), torch.zeros(20, 8))


def test_states_that_cannot_be_prepared_are_refused():
    for x, dtype in ((numbers(4, 6).double(), DTYPES[0]), (numbers(4, 6), torch.float16)):
        with pytest.raises(ConfigError, match="x: expected float32 or bfloat16"):
            kernels.prepared(x, dtype)
    with pytest.raises(ConfigError, match="x: expected"):
        kernels.prepared(numbers(4, 7), DTYPES[0])
    with pytest.raises(ConfigError, match="norm: expected"):
        kernels.prepared(numbers(4, 6), DTYPES[0], norm=numbers(5))


@pytest.mark.usefixtures("_threads", "_kind")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(24, 16), (5, 3), (64, 40), (300, 334), (17, 1601), (9, 1602)], ids=str
)
@pytest.mark.parametrize("tokens", [17, 40, 129, 300])
@pytest.mark.parametrize("before", ["nothing", "norm", "gate"])
def test_a_product_with_many_tokens_is_pytorchs(tokens, outputs, inputs, dtype, before):
    w, residual = numbers(outputs, inputs, dtype=dtype), numbers(tokens, outputs, seed=1)
    x = numbers(tokens, inputs * (2 if before == "gate" else 1), seed=2)
    norm = numbers(inputs, seed=3, dtype=dtype) if before == "norm" else None
    kept = residual.clone()
    got = kernels.linear(x, w, norm=norm, eps=1e-5, gated=before == "gate", residual=residual)
    assert torch.equal(residual, kept)
    without = kernels.linear(x, w, norm=norm, eps=1e-5, gated=before == "gate")
    if norm is not None:
        x = F.rms_norm(x, (inputs,), norm.float(), 1e-5)
    elif before == "gate":
        x = F.silu(x[:, :inputs]) * x[:, inputs:]
    wanted = x.to(dtype).float() @ w.float().T
    # A state that is calculated may be rounded to the other neighbour in bfloat16.
    atol = 1e-3 if dtype == torch.float32 or before == "nothing" else 0.1
    assert_close(got, wanted + residual, rtol=1e-5, atol=atol)
    assert_close(without, wanted, rtol=1e-5, atol=atol)


def test_products_with_many_tokens_are_those_of_pytorch_where_those_are_better(monkeypatch):
    single, half = numbers(8, 8), numbers(8, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not kernels.multiplies_many(half)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not kernels.multiplies_many(numbers(8, 9, dtype=torch.bfloat16))
    kernels._compiled.kind(0)
    try:
        assert not kernels.multiplies_many(single)
        assert kernels.multiplies_many(quantise_weight(numbers(16, 32), "int8"))
    finally:
        kernels._compiled.kind(4)


SHAPES = [
    {"norm": "pre", "num_key_value_heads": 2},
    {"norm": "post"},
    {"num_hidden_layers": 4, "kv_source_layer": 2, "num_key_value_heads": 1},
]


@pytest.fixture(params=SHAPES, ids=["pre", "post", "shared"])
def model(request, make_model):
    return make_model(
        hidden_size=64,
        intermediate_size=96,
        max_position_embeddings=160,
        dtype=torch.float32,
        **request.param,
    )


def run(model, ids, portions, *, row=None):
    """Return the logits of the last layer, (1, T, V), and the cache."""
    cache = model.make_cache(1 if row is None else 3, 150)
    rows = None if row is None else torch.tensor([row])
    parts, start = [], 0
    for length in portions:
        step = Step(positions=torch.arange(start, start + length)[None], cache=cache, rows=rows)
        h = model.embed(ids[:, start : start + length], step=step)
        for first, last in ((0, 1), (1, model.num_layers)):
            h = model.run_layers(h, first, last, step=step)
        parts.append(model.unembed(h, model.num_layers))
        start += length
    return torch.cat(parts, dim=1), cache


@pytest.mark.usefixtures("_threads", "_kind")
@pytest.mark.parametrize("weights", [*DTYPES, "int8", "int4"], ids=str)
@pytest.mark.parametrize("portions", [[120], [17, 3, 100], [70, 1, 49]], ids=str)
@pytest.mark.parametrize("row", [None, 2])
@torch.inference_mode()
def test_a_prompt_is_that_of_the_blocks(model, make_ids, weights, portions, row):
    ids = make_ids(1, 120)
    model = quantised(model, weights) if isinstance(weights, str) else model.to(weights)
    got, cache = run(model, ids, portions, row=row)
    assert (cache.lengths[:, 0 if row is None else row] == 120).all()
    assert cache.lengths.sum() == 120 * len(cache.lengths)
    with torch.enable_grad():  # the blocks themselves
        if not isinstance(weights, str):
            model = model.float()
        wanted = model(ids).detach()
    tolerance = 2e-4 if weights == torch.float32 else 0.25 if weights == torch.bfloat16 else 0.02
    assert_close(got.float(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("weights", [*DTYPES, "int8"], ids=str)
def test_the_kernels_run_prompts_and_nothing_that_is_none(make_model, make_ids, weights):
    model = make_model(hidden_size=64, max_position_embeddings=160, dtype=torch.float32)
    model = quantised(model, weights) if isinstance(weights, str) else model.to(weights)
    cache, fast = model.make_cache(2, 100), model.few_tokens.fast

    def runs(batch, tokens, *, first=0, grad=False, some=False, **step):
        given = {"positions": torch.arange(first, first + tokens)[None], "cache": cache}
        at = Step(**{**given, **step})
        with torch.inference_mode():
            h = model.embed(make_ids(batch, tokens), step=at)
        with torch.set_grad_enabled(grad):
            return model.few_tokens.of(h, at, some=some) is fast

    row = {"rows": torch.tensor([1])}
    assert runs(1, 40, **row)
    assert runs(1, 17, first=30, **row)
    assert not runs(1, 40, grad=True, **row)
    assert not runs(1, 40, some=True, **row)
    assert not runs(1, 40, cache=None)
    assert not runs(1, 40, real=torch.ones(1, 40, dtype=torch.bool), **row)
    assert not runs(1, 40, positions=torch.arange(40).flip(0)[None], **row)
    assert not runs(2, 40)
    assert not runs(17, 1)


@pytest.mark.parametrize("scheme", [None, "int8"])
@torch.inference_mode()
def test_decoding_after_a_prompt_sees_its_keys_and_values(model, make_ids, scheme):
    model = model if scheme is None else quantised(model, scheme)
    ids = make_ids(1, 60)
    together, _ = run(model, ids, [60])
    by_few, _ = run(model, ids, [FEW_TOKENS] * 3 + [12])
    assert_close(together, by_few, rtol=0, atol=1e-2 if scheme else 2e-4)
    after, _ = run(model, ids, [40] + [1] * 20)
    assert_close(after, by_few, rtol=0, atol=1e-2 if scheme else 2e-4)


@pytest.mark.parametrize("places", ["two rows", "gaps", "backwards"])
@torch.inference_mode()
def test_many_tokens_that_are_no_text_run_in_the_blocks(make_model, make_ids, places):
    model = make_model(hidden_size=64, max_position_embeddings=160, dtype=torch.float32)
    ids = make_ids(2 if places == "two rows" else 1, 40)
    positions = torch.arange(40)[None]
    if places == "gaps":
        positions = positions + (positions > 20) * 3
    elif places == "backwards":
        positions = positions.flip(1)
    found = []
    for split in (False, True):
        cache = model.make_cache(len(ids), 60)
        order = positions.argsort() if split else positions * 0 + torch.arange(40)
        parts = order[0].split(10 if split else 40)
        h = []
        for part in parts:
            step = Step(positions=positions[:, part], cache=cache)
            h.append(model.run_layers(model.embed(ids[:, part], step=step), 0, 3, step=step))
        found.append(torch.cat(h, dim=1)[:, order[0].argsort()])
    assert_close(found[0], found[1], rtol=0, atol=2e-4)
