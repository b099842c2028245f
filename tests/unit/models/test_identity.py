"""The hash of a model: what it computes, wherever it is and whatever else its files say."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, normalizers

from offramp import from_pretrained, save_exits
from offramp.errors import ConfigError
from offramp.exits.gate import FittedExits, Gate
from offramp.models.native.checkpoint import save_checkpoint
from offramp.models.open import open_in_memory, open_model
from offramp.models.save import save_model


@pytest.fixture
def native(checkpoint, make_model, tmp_path):
    folder = tmp_path / "native"
    folder.mkdir()
    vocabulary = open_model(checkpoint).model.vocab_size
    model = make_model(vocab_size=vocabulary, exit_layers=(1,), exit_head="norm", norm="post")
    save_checkpoint(model.float(), folder, about={"training": {"seq_len": 9}}, weights_about={})
    shutil.copy(checkpoint / "tokenizer.json", folder)
    return folder


@pytest.fixture
def plain(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "plain")


@pytest.fixture
def tuned(plain, tmp_path):
    model = from_pretrained(plain, exit_layers=(2,), exit_head="norm")
    model.freeze_backbone()
    save_exits(model, tmp_path / "tuned", trained={})
    return tmp_path / "tuned"


KINDS = ("native", "plain", "tuned")


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_moving_keep_it(kind, request, tmp_path):
    opened = open_model(request.getfixturevalue(kind))
    save_model(opened, tmp_path / "saved")
    assert open_model(tmp_path / "saved").sha256 == opened.sha256
    gates = {"gain": {layer: Gate(opened.model.hidden_size) for layer in opened.model.exit_layers}}
    fitted = replace(opened, fitted=FittedExits(gates=gates, temperatures={1: 1.5}))
    save_model(fitted, tmp_path / "fitted")
    (tmp_path / "fitted").rename(tmp_path / "moved")
    assert open_model(tmp_path / "moved").sha256 == fitted.sha256 != opened.sha256


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_and_runner_do_not_matter(kind, dtype, request):
    folder = request.getfixturevalue(kind)
    first = open_model(folder).sha256
    assert open_model(folder, dtype=dtype).sha256 == first
    if kind != "native":
        assert open_model(folder, dtype=dtype, runner="transformers").sha256 == first


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_config_weights_tokenizer_and_exits_matter(plain, native, tmp_path):
    seen = [open_model(plain).sha256, open_model(plain, exit_layers=(1,)).sha256]
    seen += [open_model(plain, exit_layers=(1,), exit_head="norm").sha256]
    edit(plain / "config.json", rms_norm_eps=1e-3)
    seen.append(open_model(plain).sha256)
    tokenizer = open_model(plain).tokenizer
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(plain / "tokenizer.json"))
    seen.append(open_model(plain).sha256)
    model = open_model(native)
    seen.append(model.sha256)
    edit(native / "config.json", environment={"python": "4"}, offramp_version="9")
    assert open_model(native).sha256 == model.sha256  # beside the point
    config = json.loads((native / "config.json").read_text())
    edit(native / "config.json", model={**config["model"], "rope_theta": 5.0})
    seen.append(open_model(native).sha256)
    with torch.no_grad():
        model.model.lm_head.weight[0, 0] += 1
    save_model(model, tmp_path / "other")
    seen.append(open_model(tmp_path / "other").sha256)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_memory_has_the_hash_of_its_saved_self(family, tied, checkpoint, tmp_path):
    tokenizer = open_model(checkpoint).tokenizer
    size = tokenizer.get_vocab_size()
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=size,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            tie_word_embeddings=tied,
        )
    else:
        config = transformers.GPT2Config(
            vocab_size=size, n_embd=16, n_layer=3, n_head=2, tie_word_embeddings=tied
        )
    lm = transformers.AutoModelForCausalLM.from_config(config)
    opened = open_in_memory(lm, tokenizer, exit_layers=(1,), exit_head="norm")
    save_model(opened, tmp_path / "saved")
    assert open_model(tmp_path / "saved").sha256 == opened.sha256
    field = "rms_norm_eps" if family == "llama" else "layer_norm_epsilon"
    before = opened.sha256
    setattr(lm.config, field, 0.1)
    assert open_in_memory(lm, tokenizer, exit_layers=(1,), exit_head="norm").sha256 != before


def test_a_backbone_that_was_trained_is_saved_with_the_exits(tuned, tmp_path):
    opened = open_model(tuned)
    with torch.no_grad():
        opened.model.model.norm.weight.mul_(2)
    save_model(opened, tmp_path / "whole")
    again = open_model(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "offramp.json").read_text())["base"]["id"] == "."
    assert torch.equal(again.model.model.norm.weight, opened.model.model.norm.weight)
    save_model(open_model(tuned, runner="transformers"), tmp_path / "exits")
    assert not (tmp_path / "exits" / "model.safetensors").exists()


def test_a_model_in_memory_that_changes_is_another_model(checkpoint):
    lm = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    opened = open_in_memory(lm, Tokenizer.from_file(str(checkpoint / "tokenizer.json")))
    before = opened.sha256
    assert opened.sha256 == before
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert opened.sha256 != before


def test_a_model_without_values_is_refused(checkpoint):
    lm = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).to("meta")
    with pytest.raises(ConfigError, match="got some on the meta device"):
        open_in_memory(lm, Tokenizer.from_file(str(checkpoint / "tokenizer.json")))


def test_the_source_of_shared_keys_and_values_matters(make_model, checkpoint):
    """With the source just below the last layer the weights are those of an ordinary model."""
    shape = {"num_hidden_layers": 4, "vocab_size": open_model(checkpoint).model.vocab_size}
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    plain = make_model(**shape)
    seen = [open_in_memory(plain, tokenizer).sha256]
    for source in (1, 2, 3):
        model = make_model(kv_source_layer=source, **shape)
        state = plain.state_dict()
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        seen.append(open_in_memory(model, tokenizer).sha256)
    assert len(set(seen)) == 4
