"""Scaled rotary positions (Llama 3.x, linear) in the native decoder are those of transformers."""

import json

import pytest
import torch
from torch.testing import assert_close

from offramp.errors import ConfigError
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate, generate_batch
from offramp.models.base import Step
from offramp.models.native.checkpoint import load_checkpoint, save_checkpoint
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.models.native.llama import load_native
from offramp.models.open import open_model

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALINGS = {"llama3": LLAMA3, "linear": {"rope_type": "linear", "factor": 4}}
FIELDS = {
    "rope_type": "llama3",
    "rope_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_length": 32,
}
LENGTH = 80  # longer than the original length, so that every kind of frequency matters


@pytest.fixture(params=SCALINGS)
def scaling(request):
    return SCALINGS[request.param]


@pytest.fixture
def make_llama(tmp_path):
    def make(scaling, name="llama", **fields):
        config = transformers.LlamaConfig(
            vocab_size=13,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=128,
            rope_parameters={"rope_theta": 100.0, **scaling},
            **fields,
        )
        torch.manual_seed(0)
        lm = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        lm.save_pretrained(tmp_path / name)
        return lm, tmp_path / name

    return make


def with_cache(model, ids, portions):
    """Logits of the last layer, computed with a cache in portions."""
    cache, start, parts = model.make_cache(len(ids), ids.shape[1]), 0, []
    for length in portions:
        step = Step(positions=torch.arange(start, start + length)[None], cache=cache)
        h = model.embed(ids[:, start : start + length], step=step)
        parts.append(model.unembed(model.run_layers(h, 0, model.num_layers, step=step), 3))
        start += length
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.inference_mode()
def test_scaled_positions_give_the_logits_of_transformers(make_llama, make_ids, scaling, dtype):
    lm, folder = make_llama(scaling)
    model, ids = load_native(folder, dtype=dtype), make_ids(2, LENGTH)
    expected = lm.to(dtype)(input_ids=ids).logits
    assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    usual = {name: value for name, value in model.config.stored().items() if name not in FIELDS}
    plain = Transformer(DecoderConfig(**usual)).to(dtype)  # without scaling they are others
    plain.load_state_dict(model.state_dict())
    assert (plain(ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("portions", [[1] * LENGTH, [40, 3, 20, 17], [16, 16, 16, 16, 16]])
@torch.inference_mode()
def test_with_a_cache_scaled_positions_are_the_same(make_llama, make_ids, scaling, portions):
    _, folder = make_llama(scaling)
    model, ids = load_native(folder), make_ids(2, LENGTH)
    assert_close(with_cache(model, ids, portions), model(ids), rtol=1e-4, atol=1e-4)


def test_a_batch_of_unequal_rows_and_drafts_give_the_text_of_each_alone(make_llama, scaling):
    _, folder = make_llama(scaling)
    model = load_native(folder, exit_layers=(1,))
    model.silence_untrained()
    prompts = [[1, 2, 3] * 9, [4, 5], list(range(13)) * 3]
    config = GenerateConfig(max_new_tokens=50)
    alone = []
    for prompt in prompts:
        generation = generate(model, prompt, config)
        assert generation.text == ""
        alone.append(generation.completion.ids)
        drafting = generate(model, prompt, GenerateConfig(max_new_tokens=50, speculative=True))
        assert drafting.text == ""
        assert drafting.completion.ids == alone[-1]
    together, _ = generate_batch(model, prompts, config)
    assert [each.ids for each in together] == alone


@torch.inference_mode()
def test_configs_of_older_transformers_and_the_way_back_keep_the_scaling(
    make_llama, make_ids, scaling
):
    lm, folder = make_llama(scaling)
    config = json.loads((folder / "config.json").read_text())
    old = {**config, "rope_scaling": {**scaling, "type": scaling["rope_type"]}, "rope_theta": 100.0}
    del old["rope_parameters"], old["rope_scaling"]["rope_type"]
    model = load_native(folder)
    for stored in (config, old):
        (folder / "config.json").write_text(json.dumps(stored))
        again = load_native(folder)
        assert again.config == model.config
    ids = make_ids(1, LENGTH)
    back = model.to_transformers()
    assert_close(back(input_ids=ids).logits, lm(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_the_original_length_of_llama3_defaults_as_in_transformers(make_llama):
    scaling = {name: value for name, value in LLAMA3.items() if "original" not in name}
    _, folder = make_llama(LLAMA3)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 100.0, **scaling}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_native(folder).config.rope_original_length == 128
    config["original_max_position_embeddings"] = 32  # at the top level it counts, too
    (folder / "config.json").write_text(json.dumps(config))
    assert load_native(folder).config.rope_original_length == 32


def test_a_saved_model_keeps_its_scaling_and_one_without_is_stored_as_before(make_model, tmp_path):
    plain, scaled = make_model(), make_model(**FIELDS)
    for model, known in ((plain, set()), (scaled, set(FIELDS))):
        folder = tmp_path / str(len(known))
        folder.mkdir()
        save_checkpoint(model, folder, about={}, weights_about={})
        stored = json.loads((folder / "config.json").read_text())["model"]
        assert {name for name in stored if name in FIELDS} == known
        assert load_checkpoint(folder)[0].config == model.config


def test_the_hash_of_a_model_covers_its_scaling(make_llama):
    seen = []
    for name, scaling in {**SCALINGS, "other": {**LLAMA3, "factor": 9.0}, "none": {}}.items():
        _, folder = make_llama(scaling, name)
        (folder / "tokenizer.json").write_text(
            json.dumps(
                {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
            )
        )
        seen.append(open_model(folder).sha256)
        assert open_model(folder).runner == "native"
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"factor": 0.0}, "rope_factor"),
        ({"factor": -1.0}, "rope_factor"),
        ({"factor": float("nan")}, "rope_factor"),
        ({"factor": float("inf")}, "rope_factor"),
        ({"factor": "8"}, "rope_factor"),
        ({"factor": None}, "rope_factor"),
        ({"factor": True}, "rope_factor"),
        ({"factor": ...}, "factor"),
        ({"low_freq_factor": ...}, "low_freq_factor"),
        ({"high_freq_factor": ...}, "high_freq_factor"),
        ({"low_freq_factor": 4.0}, "rope_low_freq_factor"),
        ({"low_freq_factor": 5.0}, "rope_low_freq_factor"),
        ({"low_freq_factor": 0.0}, "rope_low_freq_factor"),
        ({"high_freq_factor": float("nan")}, "rope_high_freq_factor"),
        ({"high_freq_factor": [4.0]}, "rope_high_freq_factor"),
        ({"original_max_position_embeddings": 0}, "rope_original_length"),
        ({"original_max_position_embeddings": 32.5}, "rope_original_length"),
        ({"original_max_position_embeddings": None}, "rope_original_length"),
    ],
    ids=str,
)
def test_malformed_rope_parameters_are_one_sentence(make_llama, changed, named):
    _, folder = make_llama(LLAMA3)
    config = json.loads((folder / "config.json").read_text())
    rope = {**config["rope_parameters"], **changed}
    rope = {name: value for name, value in rope.items() if value is not ...}
    if ... in changed.values():
        rope.pop("original_max_position_embeddings")
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    with pytest.raises(ConfigError, match=f"{named}.*") as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_factor": 2.0},
        {"rope_type": "linear", "rope_factor": 2.0, "rope_original_length": 32},
        {"rope_type": "linear", "rope_high_freq_factor": 8.0},
        {"rope_type": "llama3"},
    ],
    ids=str,
)
def test_fields_of_another_scaling_are_refused(fields):
    with pytest.raises(ConfigError, match="rope_"):
        DecoderConfig(**fields)
