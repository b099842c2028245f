import math

import pytest
import torch
from torch import nn

from offramp.errors import ConfigError
from offramp.models.base import EarlyExitModel
from offramp.models.native.config import DecoderConfig
from offramp.training.loop import new_model


@pytest.mark.parametrize(
    ("given", "kept"),
    [((1,), (1, 6)), ((), (6,)), ((6,), (6,)), ((4, 2), (2, 4, 6)), ((3, 3, 6), (3, 6))],
)
def test_exit_layers_ascend_and_end_with_the_last_layer(given, kept):
    assert DecoderConfig(vocab_size=5, exit_layers=given).exit_layers == kept


def test_sizes_left_out_are_filled_in():
    config = DecoderConfig(vocab_size=5, hidden_size=128, num_attention_heads=4)
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (336, 4, 32)


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 0},
        {"hidden_size": 0},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"hidden_size": 100, "num_attention_heads": 3},
        {"hidden_size": 12, "num_attention_heads": 4},  # rotary heads are even
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 8},
        {"intermediate_size": 0},
        {"exit_layers": (0,)},
        {"exit_layers": (7,)},
        {"exit_layers": (-1,)},
        {"max_position_embeddings": 0},
        {"rms_norm_eps": 0.0},
        {"rope_theta": math.nan},
        {"rope_theta": -1.0},
    ],
    ids=str,
)
def test_a_field_out_of_range_is_a_config_error_that_names_it(fields):
    with pytest.raises(ConfigError) as caught:
        DecoderConfig(**{"vocab_size": 5, **fields})
    assert str(caught.value).split(":")[0] in fields


def test_the_native_decoder_implements_the_waist(make_model):
    assert isinstance(make_model(), EarlyExitModel)


@pytest.mark.parametrize(
    ("exit_head", "own"),
    [("shared", 0), ("norm", 2 * 16), ("full", 2 * (16 + 13 * 16))],
)
def test_exits_own_what_their_kind_says(make_model, exit_head, own):
    def count(**fields):
        return sum(p.numel() for p in make_model(exit_layers=(1, 2), **fields).parameters())

    assert count(exit_head=exit_head) - count() == own


def test_a_tied_head_is_the_embedding(make_model):
    tied, untied = make_model(tie_word_embeddings=True), make_model()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_parameters_are_drawn_as_in_the_seed_document():
    model = new_model(DecoderConfig(vocab_size=3000, hidden_size=64), seed=0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(1 / 8, rel=0.05), name
        elif isinstance(module, nn.Embedding):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
        elif isinstance(module, nn.RMSNorm):
            assert torch.equal(module.weight, torch.ones(64)), name


def test_a_sequence_longer_than_the_positions_is_a_config_error(make_model, make_ids):
    model = make_model(max_position_embeddings=6)
    assert model(make_ids(1, 6)).shape == (1, 6, 13)
    with pytest.raises(ConfigError, match=r"at most 6 .* got 7"):
        model(make_ids(1, 7))


def test_no_token_sees_a_later_one(make_model, make_ids):
    model = make_model()
    ids = make_ids(1, 8)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 13
    same = torch.isclose(model(ids), model(changed)).all(dim=-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_blocks_that_project_no_keys_may_have_more_hidden_units(make_model):
    shape = {"num_hidden_layers": 4, "intermediate_size": 24}
    model = make_model(**shape, kv_source_layer=1, upper_intermediate_size=40)
    assert [block.mlp.down_proj.in_features for block in model.model.layers] == [24, 24, 40, 40]
    assert "upper_intermediate_size" not in make_model(**shape, kv_source_layer=1).config.stored()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"upper_intermediate_size": 40}, "expected none without kv_source_layer, got 40"),
        ({"upper_intermediate_size": 0, "kv_source_layer": 1}, "expected at least 1, got 0"),
        ({"upper_intermediate_size": 40, "kv_source_layer": 2}, "expected none with .* got 40"),
    ],
)
def test_a_wrong_number_of_upper_units_is_a_config_error(fields, sentence):
    with pytest.raises(ConfigError, match=f"upper_intermediate_size: {sentence}"):
        DecoderConfig(num_hidden_layers=3, **fields)
