"""A plain checkpoint of a native model's first layers says what its exit says."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from offramp.commands.export import export_exit
from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.models.base import whole_step
from offramp.models.huggingface.model import as_huggingface
from offramp.models.native.checkpoint import save_checkpoint


def saved(model, folder):
    folder.mkdir()
    save_checkpoint(model, folder, about={}, weights_about={})
    return folder


@pytest.mark.parametrize("exit_head", ["shared", "norm", "full"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("exit_layer", [2, 3])
def test_a_native_exit_becomes_a_plain_checkpoint(
    make_model, make_ids, tmp_path, exit_head, tied, exit_layer
):
    model = make_model(
        dtype=torch.float32,
        exit_layers=(2,),
        exit_head=exit_head,
        tie_word_embeddings=tied,
        num_key_value_heads=2,
        rope_theta=500.0,
    )
    export_exit(saved(model, tmp_path / "model"), exit_layer, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.num_hidden_layers == exit_layer
    ids = make_ids(2, 7)
    assert_close(plain(ids).logits, model.forward_all_layers(ids)[exit_layer - 1])


@pytest.mark.parametrize("exit_head", ["shared", "norm", "full"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_an_exit_up_to_the_block_above_the_source_becomes_a_plain_checkpoint(
    make_model, make_ids, tmp_path, exit_head, tied, exit_layer
):
    model = make_model(
        dtype=torch.float32,
        num_hidden_layers=5,
        exit_layers=(1, 2, 3, 4),
        exit_head=exit_head,
        tie_word_embeddings=tied,
        num_key_value_heads=2,
        kv_source_layer=2,
    )
    export_exit(saved(model, tmp_path / "model"), exit_layer, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert (plain.config.num_hidden_layers, plain.config.model_type) == (exit_layer, "llama")
    ids = make_ids(2, 7)
    assert_close(plain(ids).logits, model.forward_all_layers(ids)[exit_layer - 1])


@pytest.mark.parametrize("exit_layer", [4, 5])
def test_blocks_that_share_keys_and_values_are_refused(make_model, tmp_path, exit_layer):
    model = make_model(
        dtype=torch.float32, num_hidden_layers=5, exit_layers=(1, 2, 3, 4), kv_source_layer=2
    )
    folder = saved(model, tmp_path / "model")
    message = "^exit: expected at most 3, since the blocks above share keys and values, .* got "
    with pytest.raises(UnsupportedArchitectureError, match=f"{message}{exit_layer}$"):
        export_exit(folder, exit_layer, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    with pytest.raises(UnsupportedArchitectureError, match=r"^kv_source_layer: expected a model"):
        model.to_transformers()


def test_a_source_just_below_the_last_layer_is_a_plain_llama(make_model, make_ids, tmp_path):
    model = make_model(dtype=torch.float32, exit_layers=(1,), kv_source_layer=2)
    export_exit(saved(model, tmp_path / "model"), 3, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = make_ids(2, 7)
    assert_close(plain(ids).logits, model(ids))


def test_every_exit_is_the_same_behind_transformers(make_model, make_ids):
    model = make_model(dtype=torch.float32, exit_layers=(1, 2), exit_head="adapter")
    model.exits["1"].adapter.direct_proj.weight.data.normal_(std=0.1)
    ids = make_ids(2, 5)
    other = as_huggingface(model)
    for layer in (1, 2, 3):
        h = other.embed(ids, step=(step := whole_step(ids)))
        logits = other.unembed(other.run_layers(h, 0, layer, step=step), layer)
        assert_close(logits, model.forward_all_layers(ids)[layer - 1])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"norm": "post"}, UnsupportedArchitectureError, "pre-norm"),
        ({"exit_head": "adapter"}, ConfigError, "adapter"),
        ({"exit_head": "adapter", "kv_source_layer": 1}, ConfigError, "adapter"),
        ({"norm": "post", "kv_source_layer": 1}, UnsupportedArchitectureError, "pre-norm"),
    ],
)
def test_what_no_plain_checkpoint_can_hold_is_refused(make_model, tmp_path, fields, error, message):
    model = make_model(dtype=torch.float32, exit_layers=(2,), **fields)
    folder = saved(model, tmp_path / "model")
    with pytest.raises(error, match=message):
        export_exit(folder, 2, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
