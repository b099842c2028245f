"""Shared keys and values are fitted to a model's own, and are exact where they can be."""

import pytest
import torch

from offramp.errors import ConfigError, CorpusError
from offramp.models.base import whole_step
from offramp.training import kv_fit
from offramp.training.kv_fit import check_source, share_keys_values, with_config


@torch.no_grad()
def logits(model, ids, layer=None):
    layer = layer or model.num_layers
    [(_, h)] = model.states_at(ids, [layer], step=whole_step(ids))
    return model.unembed(h, layer)


@torch.no_grad()
def divergence(model, other, ids):
    p, q = (logits(each, ids).log_softmax(-1) for each in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def text(make_ids):
    return make_ids(1, 400)[0]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_below_the_last_layer_nothing_changes(make_model, make_ids, text, kv_heads, tied):
    model = make_model(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    shared = share_keys_values(model, text, 2, seq_len=32)
    ids = make_ids(2, 20, seed=3)
    assert not torch.equal(
        shared.model.layers[2].self_attn.v_proj.weight,
        model.model.layers[2].self_attn.v_proj.weight,
    )
    torch.testing.assert_close(logits(shared, ids), logits(model, ids), rtol=0, atol=1e-9)


@pytest.fixture
def related(make_model):
    """A model of which blocks 3 and 4 have the keys and values of block 2, mapped linearly."""
    model = make_model(num_hidden_layers=4, num_key_value_heads=2)
    random = torch.Generator().manual_seed(5)
    first, *above = model.model.layers[1:]
    with torch.no_grad():
        for block in (first, above[0]):  # they leave the state as it is
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        for block in above:
            block.input_layernorm.weight.copy_(first.input_layernorm.weight)
            keys = first.self_attn.k_proj.weight.view(2, 2, 2, -1)  # heads, halves, pairs
            pairs = torch.complex(keys[:, 0], keys[:, 1])
            factor = torch.randn(2, 2, 1, dtype=pairs.dtype, generator=random)
            keys = torch.view_as_real(pairs * factor).movedim(-1, 1)
            block.self_attn.k_proj.weight.copy_(keys.reshape(8, -1))
            values = first.self_attn.v_proj.weight.view(2, 4, -1)
            maps = torch.randn(2, 4, 4, dtype=values.dtype, generator=random)
            block.self_attn.v_proj.weight.copy_((maps @ values).reshape(8, -1))
    return model


def test_keys_and_values_that_one_projection_can_give_are_exact(
    related, make_ids, text, monkeypatch
):
    monkeypatch.setattr(kv_fit, "RIDGE", 0)
    shared = share_keys_values(related, text, 1, seq_len=32)
    ids = make_ids(2, 20, seed=3)
    torch.testing.assert_close(logits(shared, ids), logits(related, ids), rtol=0, atol=1e-6)
    only = with_config(related, kv_source_layer=1)  # the same without the maps
    assert (logits(only, ids) - logits(related, ids)).abs().max() > 0.01


def test_the_fit_is_closer_than_the_keys_and_values_of_the_first_block(make_model, make_ids, text):
    ids = make_ids(4, 24, seed=3)
    for seed in range(3):
        model = make_model(seed=seed, num_hidden_layers=5, num_key_value_heads=2)
        fitted = share_keys_values(model, text, 2, seq_len=32)
        only = with_config(model, kv_source_layer=2)
        assert divergence(model, fitted, ids) < 0.7 * divergence(model, only, ids)


def test_the_model_stays_and_the_new_one_has_its_exits(make_model, make_ids, text):
    model = make_model(num_hidden_layers=4, exit_layers=(1, 3), exit_head="norm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shared = share_keys_values(model, text, 2, seq_len=32, first_tokens=(1, 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (shared.config.kv_source_layer, shared.complete_from) == (2, 2)
    assert shared.exit_layers == (1, 3, 4)
    assert shared.make_cache(1, 8).lengths.shape == (3, 1)
    ids = make_ids(2, 20)
    assert torch.equal(logits(shared, ids, 1), logits(model, ids, 1))
    assert torch.isfinite(logits(shared, ids)).all()


def test_only_as_many_tokens_are_read_as_the_width_needs(make_model, make_ids):
    told = []
    ids = make_ids(1, 900)[0]
    model = make_model()
    share_keys_values(model, ids, 1, seq_len=64, on_progress=lambda *told_: told.append(told_))
    assert told[-1] == (512, 512)  # 32 for each of 16 dimensions


def test_a_block_that_ignores_its_attention_is_no_obstacle(make_model, make_ids, text):
    model = make_model()
    for name in ("o_proj", "q_proj"):
        for block in model.model.layers:
            getattr(block.self_attn, name).weight.data.zero_()
    shared = share_keys_values(model, text, 1, seq_len=32)
    ids = make_ids(2, 20)
    torch.testing.assert_close(logits(shared, ids), logits(model, ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("zero", ["first", "all"])
def test_heads_without_keys_and_values_are_no_obstacle(make_model, make_ids, text, zero):
    model = make_model(num_hidden_layers=4, num_key_value_heads=2)
    for block in model.model.layers[1 : 2 if zero == "first" else 4]:
        block.self_attn.k_proj.weight.data[:4] = 0
        block.self_attn.v_proj.weight.data[:4] = 0
    shared = share_keys_values(model, text, 1, seq_len=32)
    assert all(torch.isfinite(value).all() for value in shared.state_dict().values())
    only = with_config(model, kv_source_layer=1)
    ids = make_ids(4, 20)
    assert divergence(model, shared, ids) < divergence(model, only, ids)


def test_a_text_without_a_token_to_predict_is_refused(make_model):
    with pytest.raises(CorpusError, match="at least 2 tokens, got 1"):
        share_keys_values(make_model(), torch.tensor([1]), 1, seq_len=32)


@pytest.mark.parametrize(
    ("fields", "source", "sentence"),
    [
        ({}, 3, "kv_source: expected from 1 to 2, below the last layer, got 3"),
        ({}, 0, "kv_source: expected from 1 to 2, below the last layer, got 0"),
        ({"num_hidden_layers": 1}, 1, "expected none in a model of one layer, got 1"),
        ({"norm": "post"}, 1, "expected a pre-norm model, got a post-norm model"),
        ({"kv_source_layer": 1}, 2, "own, got one that shares those after layer 1"),
        ({"dtype": torch.bfloat16}, 1, "expected weights in float32, .* got bfloat16"),
    ],
)
def test_models_that_cannot_share_are_refused(make_model, text, fields, source, sentence):
    model = make_model(**fields)
    for refuse in (
        lambda: check_source(model, source),
        lambda: share_keys_values(model, text, source, seq_len=32),
    ):
        with pytest.raises(ConfigError, match=sentence):
            refuse()
