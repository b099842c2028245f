"""The compiled kernels do what PyTorch does, and each token alone decides what it gets."""

import pickle
from copy import copy, deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from offramp.models.base import Step
from offramp.models.native.fast import kernels, weights

pytestmark = pytest.mark.skipif(kernels._compiled is None, reason="the kernels were not built")

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(24, 16), (5, 3), (64, 40), (300, 333)]


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("_threads", "_kind")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 16])
@pytest.mark.parametrize("before", ["nothing", "norm", "gate"])
def test_a_product_is_pytorchs(tokens, outputs, inputs, dtype, before):
    w, residual = numbers(outputs, inputs, dtype=dtype), numbers(tokens, outputs, seed=1)
    x = numbers(tokens, inputs * (2 if before == "gate" else 1), seed=2)
    norm = numbers(inputs, seed=3, dtype=dtype) if before == "norm" else None
    got = kernels.linear(x, w, norm=norm, eps=1e-5, gated=before == "gate", residual=residual)
    if norm is not None:
        x = F.rms_norm(x, (inputs,), norm.float(), 1e-5)
    elif before == "gate":
        x = F.silu(x[:, :inputs]) * x[:, inputs:]
    # A state that is calculated may be rounded to the other neighbour in bfloat16.
    atol = 1e-4 if dtype == torch.float32 or before == "nothing" else 0.03
    assert_close(got, x.to(dtype).float() @ w.float().T + residual, rtol=1e-5, atol=atol)


@pytest.mark.usefixtures("_threads", "_kind")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_a_token_gets_the_same_bits_in_any_company(outputs, inputs, dtype):
    w, norm = numbers(outputs, inputs, dtype=dtype), numbers(inputs, seed=1, dtype=dtype)
    x = numbers(16, inputs, seed=2)
    alone = torch.cat([kernels.linear(row[None], w, norm=norm, eps=1e-6) for row in x])
    for tokens in range(2, 17):
        together = kernels.linear(x[:tokens], w, norm=norm, eps=1e-6)
        assert torch.equal(together, alone[:tokens])


def test_what_is_no_number_stays_none():
    x, w = numbers(1, 32), numbers(8, 16)
    x[0, 3] = torch.nan
    assert kernels.linear(x, w, gated=True).isnan().all()
    cos, sin = torch.ones(1, 8), torch.zeros(1, 8)
    cache = torch.zeros(1, 1, 1, 4, 8)
    at = torch.zeros(1, dtype=torch.long)
    held = kernels.KernelCache(cache, cache.clone(), at[None].clone(), cos, sin)
    tokens = kernels.CachedTokens(held, slots=at, rows=at)
    qkv = numbers(1, 24)
    qkv[0, 0] = torch.nan
    assert tokens.attend(qkv, 0).isnan().all()


def test_the_exponential_is_exact_to_rounding_wherever_it_matters():
    gate = torch.linspace(-120, 120, 4001)
    x = torch.cat((gate, torch.ones_like(gate)))[None]
    got = kernels.linear(x, torch.eye(len(gate)), gated=True)[0]
    assert_close(got, F.silu(gate), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("portions", [[9], [5, 1, 1, 1, 1], [3, 4, 2]], ids=str)
@pytest.mark.parametrize("head", ["adapter", "specialist"])
@pytest.mark.usefixtures("_threads")
@torch.inference_mode()
def test_a_model_says_the_same_by_kernels(
    make_model, make_ids, norm, kv_heads, dtype, portions, head
):
    model = make_model(
        dtype=dtype,
        norm=norm,
        hidden_size=64,
        intermediate_size=512,
        num_key_value_heads=kv_heads,
        exit_head=head,
    )
    assert kernels.kernels_fit(model.lm_head.weight, model.config.head_dim)
    if head == "adapter":
        model.exits["1"].adapter.direct_proj.weight.normal_(std=0.1)
    model.exits["1"].adapter.down_proj.weight.normal_(std=0.1)
    ids = make_ids(2, 9)
    cache = model.make_cache(2, capacity=11)
    parts, start = {1: [], 3: []}, 0
    for length in portions:
        places = torch.arange(start, start + length)[None]
        step = Step(positions=places, cache=cache)
        h = model.embed(ids[:, start : start + length], step=step)
        for first, last in ((0, 1), (1, 3)):
            h = model.run_layers(h, first, last, step=step)
            parts[last].append(model.unembed(h, last))
        start += length
    with torch.enable_grad():  # the plain blocks
        every = model.float().forward_all_layers(ids)
    for layer, found in parts.items():
        tolerance = 1e-4 if dtype == torch.float32 else 0.25
        assert_close(torch.cat(found, 1).float(), every[layer - 1].detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_tokens_decoded_together_have_the_bits_of_each_alone(make_model, make_ids, norm, dtype):
    """So verifying drafts says what decoding one by one says, to the last bit."""
    model = make_model(dtype=dtype, norm=norm, hidden_size=64, num_key_value_heads=2)
    ids, length = make_ids(1, 12), 12
    said = []
    for portions in ([1] * length, [1, 2, 3, 6], [4, 8], [length]):
        cache, start, parts = model.make_cache(1, capacity=length), 0, []
        for portion in portions:
            step = Step(positions=torch.arange(start, start + portion)[None], cache=cache)
            h = model.embed(ids[:, start : start + portion], step=step)
            for first, last in [(0, 3)] if portion == 1 else [(0, 2), (2, 3)]:  # as drafts do
                h = model.run_layers(h, first, last, step=step)
            parts.append(model.unembed(h, 3))
            start += portion
        said.append(torch.cat(parts, dim=1))
    assert all(torch.equal(other, said[0]) for other in said)


@torch.inference_mode()
def test_keys_and_values_alone_are_those_of_whole_blocks(make_model, make_ids):
    model = make_model(dtype=torch.float32, hidden_size=64, num_key_value_heads=2)
    ids = make_ids(3, 4)
    step = Step(positions=torch.arange(4)[None], cache=model.make_cache(3, capacity=6))
    h = model.embed(ids, step=step)
    model.run_layers(h, 0, 1, step=step)
    alone = Step(positions=step.positions, cache=model.make_cache(3, capacity=6))
    model.project_kv(h, 0, 1, step=alone)
    assert torch.equal(alone.cache.keys, step.cache.keys)
    assert torch.equal(alone.cache.values, step.cache.values)
    assert torch.equal(alone.cache.lengths, step.cache.lengths)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("active", ["0011", "1100", "0101", "0000", "1111"])
@pytest.mark.parametrize("by_row", [False, True], ids=["in one row", "a row each"])
@torch.inference_mode()
def test_tokens_that_are_done_only_leave_keys_and_values(
    make_model, make_ids, norm, dtype, active, by_row
):
    """In whatever order they stand: as projected first, then the others run, to the last bit."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_key_value_heads": 2}
    model = make_model(dtype=dtype, norm=norm, **shape)  # enough work for two threads
    ids = make_ids(4, 1) if by_row else make_ids(1, 4)
    positions = torch.zeros(1, 1).long() if by_row else torch.arange(4)[None]
    goes = torch.tensor([each == "1" for each in active]).view(ids.shape)
    step, other = (
        Step(positions=positions, cache=model.make_cache(len(ids), capacity=5)) for _ in range(2)
    )
    h = model.embed(ids, step=step)
    got = model.run_layers(h, 0, 3, step=step, active=goes)
    assert torch.equal(got[~goes], h[~goes])
    expected = h
    for layer in range(3):  # with every token, and the states of some put back
        out = model.run_layers(expected, layer, layer + 1, step=other)
        expected = torch.where(goes[..., None], out, expected)
    same = {"rtol": 0, "atol": 0} if dtype != torch.float64 else {"rtol": 1e-9, "atol": 1e-9}
    assert_close(got, expected, **same)
    assert_close(step.cache.keys, other.cache.keys, **same)
    assert_close(step.cache.values, other.cache.values, **same)
    assert torch.equal(step.cache.lengths, other.cache.lengths)


@torch.inference_mode()
def test_some_rows_go_on_alone(make_model, make_ids):
    model = make_model(dtype=torch.float32, hidden_size=64, num_key_value_heads=2)
    ids, rows = make_ids(4, 6), torch.tensor([3, 1])
    cache = model.make_cache(4, capacity=6)
    step = Step(positions=torch.arange(5)[None], cache=cache)
    model.run_layers(model.embed(ids[:, :5], step=step), 0, 3, step=step)
    step = Step(positions=torch.tensor([[5]]), cache=cache, rows=rows)
    h = model.run_layers(model.embed(ids[rows, 5:], step=step), 0, 3, step=step)
    assert_close(model.unembed(h, 3), model(ids)[rows, 5:], rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [[5, 6, 5, 6]] * 3


@pytest.mark.parametrize("compiled", [True, False])
@torch.inference_mode()
def test_without_kernels_there_is_another_way(make_model, make_ids, monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(kernels, "_compiled", None)
    model = make_model(dtype=torch.float32, hidden_size=64, num_key_value_heads=2)
    assert kernels.kernels_fit(model.lm_head.weight, 16) == compiled
    ids = make_ids(2, 5)
    step = Step(positions=torch.arange(5)[None], cache=model.make_cache(2, capacity=5))
    h = model.run_layers(model.embed(ids, step=step), 0, 3, step=step)
    assert_close(model.unembed(h, 3), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fork", [copy, deepcopy])
@torch.inference_mode()
def test_a_cache_whose_tensors_were_replaced_is_read_anew(make_model, make_ids, fork):
    """As when a search keeps two of its texts: the rows of a copy change places."""
    model = make_model(dtype=torch.float32, hidden_size=64)
    ids = make_ids(2, 6)
    cache = model.make_cache(2, capacity=6)
    step = Step(positions=torch.arange(5)[None], cache=cache)
    model.run_layers(model.embed(ids[:, :5], step=step), 0, 3, step=step)
    forked = fork(cache)
    for name in ("keys", "values"):
        setattr(forked, name, getattr(forked, name).flip(1).contiguous())
    before = cache.keys.clone()
    step = Step(positions=torch.tensor([[5]]), cache=forked)
    h = model.run_layers(model.embed(ids.flip(0)[:, 5:], step=step), 0, 3, step=step)
    assert_close(model.unembed(h, 3), model(ids.flip(0))[:, 5:], rtol=1e-4, atol=1e-4)
    assert torch.equal(cache.keys, before)


def test_a_copy_decodes_by_its_own_parameters(make_model, make_ids):
    model = make_model(dtype=torch.float32, hidden_size=64)
    ids = make_ids(1, 4)

    def decoded(model):
        with torch.inference_mode():
            step = Step(positions=torch.arange(4)[None], cache=model.make_cache(1, capacity=4))
            h = model.run_layers(model.embed(ids, step=step), 0, 3, step=step)
            return model.unembed(h, 3)

    before = decoded(model)
    other = deepcopy(model)
    assert torch.equal(decoded(other), before)
    for parameter in other.model.layers[1].mlp.parameters():  # replaced: the next cache sees it
        parameter.data = parameter.data * 2
    assert not torch.equal(decoded(other), before)
    assert_close(decoded(other), other(ids), rtol=1e-4, atol=1e-4)
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(decoded(copied), before)
        with torch.no_grad():
            for part in (
                copied.model.layers[0].self_attn.q_proj,
                copied.model.layers[0].mlp.gate_proj,
            ):
                part.weight.mul_(2)
        changed = decoded(copied)
        assert not torch.equal(changed, before)
        assert_close(changed, copied(ids), rtol=1e-4, atol=1e-4)
        copied.model.layers[1].mlp.gate_proj.weight = nn.Parameter(
            model.model.layers[0].mlp.gate_proj.weight.clone()
        )
        assert_close(decoded(copied), copied(ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(decoded(model), before)
    with torch.no_grad():
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(model.parameters()) * 0.5, model.parameters()
        )
    assert_close(decoded(model), model(ids), rtol=1e-4, atol=1e-4)
    before = decoded(model)
    assert_close(decoded(model.double()).float(), before, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_parameters_are_looked_up_once_a_cache(make_model, make_ids, monkeypatch):
    model = make_model(dtype=torch.float32, hidden_size=64)
    ids, looked = make_ids(1, 6), []
    monkeypatch.setattr(weights.Weights, "current", lambda _: looked.append(1) or True)

    def decode(cache, first):
        for place in range(first, first + 3):
            step = Step(positions=torch.tensor([[place]]), cache=cache)
            model.run_layers(model.embed(ids[:, place : place + 1], step=step), 0, 3, step=step)

    one, other = (model.make_cache(1, capacity=6) for _ in range(2))
    decode(one, 0)
    assert len(looked) == 0
    decode(other, 0)
    decode(other, 3)
    assert len(looked) == 1
    decode(one, 3)
    assert len(looked) == 2


@torch.inference_mode()
def test_states_may_lie_anyhow_in_memory(make_model, make_ids):
    model = make_model(dtype=torch.float32, hidden_size=64)
    whole = F.embedding(make_ids(2, 4), model.model.embed_tokens.weight)
    said = []
    for h in (whole[:, -1:], whole[:, -1:].clone()):
        step = Step(positions=torch.zeros(1, 1).long(), cache=model.make_cache(2, capacity=3))
        said.append(model.run_layers(h, 0, 3, step=step))
    assert torch.equal(*said)


@torch.inference_mode()
def test_a_step_with_other_places_begins_anew(make_model, make_ids):
    model = make_model(dtype=torch.float32, hidden_size=64)
    ids, cache = make_ids(1, 8), model.make_cache(1, capacity=8)
    step = Step(positions=torch.arange(4)[None], cache=cache)
    model.run_layers(model.embed(ids[:, :4], step=step), 0, 3, step=step)
    step = replace(step, positions=torch.arange(4, 8)[None])
    h = model.run_layers(model.embed(ids[:, 4:], step=step), 0, 3, step=step)
    assert_close(model.unembed(h, 3), model(ids)[:, 4:], rtol=1e-4, atol=1e-4)
    other = make_model(dtype=torch.float32, hidden_size=64, rope_theta=50.0)
    h = other.run_layers(other.embed(ids[:, 4:], step=step), 0, 1, step=step)
    fresh = replace(step)
    assert torch.equal(h, other.run_layers(other.embed(ids[:, 4:], step=fresh), 0, 1, step=fresh))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": torch.tensor([0, 2])}, "holds 2 rows, got row 2"),
        ({"rows": torch.tensor([-1, 0])}, "holds 2 rows, got row -1"),
        ({"positions": torch.tensor([[-1]])}, "at least 0, got -1"),
        ({"positions": torch.tensor([[5]])}, "holds 5 positions"),
    ],
)
@torch.inference_mode()
def test_nothing_is_written_beside_the_cache(make_model, make_ids, fields, message):
    model = make_model(dtype=torch.float32, hidden_size=64)
    cache = model.make_cache(2, capacity=5)
    step = Step(**({"positions": torch.tensor([[0]]), "cache": cache} | fields))
    with pytest.raises(ValueError, match=message):
        model.run_layers(model.embed(make_ids(2, 1), step=step), 0, 3, step=step)
    assert not cache.keys.any()
