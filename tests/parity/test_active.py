"""Tokens that left keep their state, and later tokens see the keys and values made from it."""

import math

import pytest
import torch
from torch.testing import assert_close

from offramp.models.base import Step, whole_step

BATCH, LENGTH = 2, 6


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture
def active():
    return torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 1]], dtype=torch.bool)


@pytest.fixture
def h(model):
    random = torch.Generator().manual_seed(5)
    return torch.randn(BATCH, LENGTH, 16, generator=random, dtype=torch.float64)


# The reference: one token, one head, one key at a time, from the formulas.


def rms_norm(norm, x):
    return x / (x.square().mean() + 1e-6).sqrt() * norm.weight


def rotated(x, position):
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * 10_000.0 ** (-2 * i / len(x))
        a, b = x[i], x[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention(module, xs):
    """Output for the last of the tokens xs, (t, D)."""
    size, groups = module.head_dim, len(module.q_proj.weight) // len(module.k_proj.weight)
    q = (module.q_proj.weight @ xs[-1]).split(size)
    keys = [(module.k_proj.weight @ x).split(size) for x in xs]
    values = [(module.v_proj.weight @ x).split(size) for x in xs]
    heads = []
    for head in range(len(q)):
        kv = head // groups
        query = rotated(q[head], len(xs) - 1)
        scores = torch.stack([query @ rotated(k[kv], s) for s, k in enumerate(keys)])
        shares = (scores / size**0.5).softmax(0)
        heads.append(sum(p * v[kv] for p, v in zip(shares, values, strict=True)))
    return module.o_proj.weight @ torch.cat(heads)


def mlp(module, x):
    gate = module.gate_proj.weight @ x
    return module.down_proj.weight @ (gate * gate.sigmoid() * (module.up_proj.weight @ x))


def block(model, module, hs):
    """The last token's new state, given the states hs (t, D) at this layer."""
    if model.config.norm == "pre":
        xs = torch.stack([rms_norm(module.input_layernorm, h) for h in hs])
        h = hs[-1] + attention(module.self_attn, xs)
        return h + mlp(module.mlp, rms_norm(module.post_attention_layernorm, h))
    h = rms_norm(module.post_attention_layernorm, hs[-1] + attention(module.self_attn, hs))
    return rms_norm(module.post_feedforward_layernorm, h + mlp(module.mlp, h))


def reference(model, h, start, stop, active):
    for layer in range(start, stop):
        new = h.clone()
        for row in range(BATCH):
            for t in range(LENGTH):
                if active[row, t]:
                    new[row, t] = block(model, model.model.layers[layer], h[row, : t + 1])
        h = new
    return h


def test_layers_equal_the_formulas_written_out(model, h):
    everyone = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    out = model.run_layers(h, 0, 3, step=whole_step(torch.zeros(BATCH, LENGTH, dtype=torch.long)))
    assert_close(out, reference(model, h, 0, 3, everyone), rtol=0, atol=1e-6)


def test_layers_with_inactive_tokens_equal_the_formulas_written_out(model, h, active):
    step = whole_step(torch.zeros(BATCH, LENGTH, dtype=torch.long))
    out = model.run_layers(h, 1, 3, step=step, active=active)
    assert_close(out, reference(model, h, 1, 3, active), rtol=0, atol=1e-6)
    assert torch.equal(out[~active], h[~active])
    assert not torch.isclose(out[active], h[active]).all(dim=-1).any()


def test_inactive_tokens_take_no_mlp(model, h, active):
    took = []
    model.model.layers[2].mlp.register_forward_hook(lambda _, inputs, out: took.append(len(out)))
    step = whole_step(torch.zeros(BATCH, LENGTH, dtype=torch.long))
    model.run_layers(h, 1, 3, step=step, active=active)
    assert took == [int(active.sum())]


def test_everyone_active_is_the_same_as_no_mask(model, h):
    step = whole_step(torch.zeros(BATCH, LENGTH, dtype=torch.long))
    everyone = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    assert torch.equal(
        model.run_layers(h, 0, 3, step=step, active=everyone), model.run_layers(h, 0, 3, step=step)
    )


def test_inactive_tokens_with_a_cache_equal_those_without(model, h, active):
    step = whole_step(torch.zeros(BATCH, LENGTH, dtype=torch.long))
    expected = model.run_layers(h, 0, 3, step=step, active=active)
    cache = model.make_cache(BATCH, capacity=LENGTH)
    parts = []
    for tokens in (slice(0, 2), slice(2, 3), slice(3, 6)):
        step = Step(positions=torch.arange(LENGTH)[None, tokens], cache=cache)
        parts.append(model.run_layers(h[:, tokens], 0, 3, step=step, active=active[:, tokens]))
    assert_close(torch.cat(parts, dim=1), expected)


def test_projecting_keys_and_values_equals_running_the_layers_inactive(model, h):
    """Three tokens leave at layer 1; the three after them go deep."""
    early = Step(positions=torch.arange(3)[None], cache=model.make_cache(BATCH, LENGTH))
    model.project_kv(h[:, :3], 1, 3, step=early)
    other = Step(positions=torch.arange(3)[None], cache=model.make_cache(BATCH, LENGTH))
    nobody = torch.zeros(BATCH, 3, dtype=torch.bool)
    model.run_layers(h[:, :3], 1, 3, step=other, active=nobody)
    assert_close(early.cache.keys, other.cache.keys)
    assert_close(early.cache.values, other.cache.values)
    assert torch.equal(early.cache.lengths, other.cache.lengths)
    assert early.cache.lengths[:, 0].tolist() == [0, 3, 3]
    after = [
        model.run_layers(h[:, 3:], 1, 3, step=Step(positions=torch.arange(3, 6)[None], cache=cache))
        for cache in (early.cache, other.cache)
    ]
    assert_close(after[0], after[1])
    masked = torch.arange(LENGTH).expand(BATCH, -1) >= 3
    step = whole_step(torch.zeros(BATCH, LENGTH, dtype=torch.long))
    assert_close(after[0], model.run_layers(h, 1, 3, step=step, active=masked)[:, 3:])


def test_projecting_some_rows_leaves_the_others_alone(model, h):
    cache = model.make_cache(BATCH, LENGTH)
    step = Step(positions=torch.arange(2)[None], cache=cache, rows=torch.tensor([1]))
    model.project_kv(h[1:, :2], 1, 2, step=step)
    assert cache.lengths.tolist() == [[0, 0], [0, 2], [0, 0]]
    assert not cache.keys[:, 0].any()
    assert not cache.keys[[0, 2]].any()
    assert cache.keys[1, 1, :, :2].all()
