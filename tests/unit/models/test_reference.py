"""The native decoder is compared with transformers when a checkpoint is first opened."""

import dataclasses
import sys
import types
import warnings
from contextlib import nullcontext

import pytest
import torch
import transformers

from offramp.errors import CheckpointError, OfframpWarning, UnsupportedArchitectureError
from offramp.models import reference
from offramp.models.loading import load_weights
from offramp.models.model_files import find_model
from offramp.models.native import llama
from offramp.models.open import open_model

IDS = torch.arange(60)[None] % 30


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checked"


@pytest.fixture
def loads(monkeypatch):
    """The checkpoints that were loaded for a comparison."""
    found, load = [], reference.load_backbone

    def counted(source, dtype):
        found.append((source.id, dtype))
        return load(source, dtype)

    monkeypatch.setattr(reference, "load_backbone", counted)
    return found


def test_a_checkpoint_is_compared_once_in_each_precision(checkpoint, loads, cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error", OfframpWarning)
        for dtype in (None, torch.float32, torch.bfloat16, torch.bfloat16):
            assert open_model(checkpoint, dtype=dtype).runner == "native"
    assert [dtype for _, dtype in loads] == [torch.float32, torch.bfloat16]
    assert len(list(cache.iterdir())) == 2
    for record in cache.iterdir():
        record.write_text("damaged")
    assert open_model(checkpoint).runner == "native"
    assert len(loads) == 3


def test_other_weights_are_another_checkpoint(checkpoint, loads, tmp_path):
    load_weights(find_model(checkpoint))
    lm = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    lm.save_pretrained(tmp_path / "other")
    load_weights(find_model(tmp_path / "other"))
    assert len(loads) == 2


WRONG = {
    "the base of the rotary positions": {"rope_theta": 2_000.0},
    "the epsilon of the norms": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_decoder_that_differs_is_not_used(checkpoint, monkeypatch, what, cache):
    right = llama.decoder_config

    def wrong(stored, **exits):
        return dataclasses.replace(right(stored, **exits), **WRONG[what])

    monkeypatch.setattr(llama, "decoder_config", wrong)
    for _ in range(2):  # it is said each time
        with pytest.warns(OfframpWarning, match="transformers runs this model, since the native"):
            model = load_weights(find_model(checkpoint))
        assert not isinstance(model, llama.Transformer)
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)(IDS).logits
        torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-5)
    assert not cache.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["a window", "a scaling of rotary positions"])
def test_a_window_and_scaled_positions_are_seen(tmp_path, monkeypatch, what, dtype):
    shape = {
        **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2},
        **{"intermediate_size": 48, "max_position_embeddings": 8192},
    }
    more = {"sliding_window": 8192} if what == "a window" else {}
    scaled = {
        **{"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 1024,
    }
    if what != "a window":
        more["rope_parameters"] = {"rope_type": "default", "rope_theta": 500_000.0}
    family = "mistral" if what == "a window" else "llama"
    config = transformers.AutoConfig.for_model(family, **shape, **more)
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    lm.save_pretrained(tmp_path / "same")
    assert isinstance(load_weights(find_model(tmp_path / "same"), dtype=dtype), llama.Transformer)
    if what == "a window":
        lm.config.sliding_window = 16
    else:
        lm.config.rope_parameters = scaled
    lm.save_pretrained(tmp_path / "other")
    right = llama.decoder_config

    def blind(stored, **exits):
        return right({**stored, **more}, **exits)

    monkeypatch.setattr(llama, "decoder_config", blind)
    with pytest.warns(OfframpWarning):
        model = load_weights(find_model(tmp_path / "other"), dtype=dtype)
    assert not isinstance(model, llama.Transformer)


def test_without_transformers_nothing_is_compared(checkpoint, monkeypatch, loads):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert open_model(checkpoint).runner == "native"
    assert not loads


def test_transformers_is_not_imported_for_a_checkpoint_that_was_compared(checkpoint, monkeypatch):
    open_model(checkpoint)
    empty = types.ModuleType("transformers")  # whoever uses it fails
    empty.__spec__ = transformers.__spec__
    monkeypatch.setitem(sys.modules, "transformers", empty)
    assert open_model(checkpoint).runner == "native"


def test_a_cache_folder_that_cannot_be_written_is_no_reason_to_stop(checkpoint, monkeypatch, loads):
    monkeypatch.setenv("OFFRAMP_CACHE", "/dev/null")
    for _ in range(2):
        assert open_model(checkpoint).runner == "native"
    assert len(loads) == 2


def test_an_lm_head_of_zeros_is_no_difference(checkpoint, tmp_path):
    lm = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        lm.model.norm.weight.zero_()
    lm.save_pretrained(tmp_path / "zeros")
    with warnings.catch_warnings():
        warnings.simplefilter("error", OfframpWarning)
        model = load_weights(find_model(tmp_path / "zeros"))
    assert isinstance(model, llama.Transformer)


@pytest.mark.parametrize("scale", [1e37, torch.inf])
def test_weights_that_overflow_do_not_blame_the_architecture(checkpoint, tmp_path, scale):
    lm = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        lm.model.norm.weight.mul_(scale)
        finite = bool(lm(IDS).logits.isfinite().all())
    assert finite == (scale == 1e37)
    lm.save_pretrained(tmp_path / "large")
    expected = nullcontext() if finite else pytest.raises(CheckpointError, match=r"got (nan|inf)")
    with expected:
        load_weights(find_model(tmp_path / "large"), runner="transformers")


def test_transformers_as_the_chosen_runner_is_not_compared(checkpoint, loads):
    assert open_model(checkpoint, runner="transformers").runner == "transformers"
    assert not loads


def test_the_native_decoder_as_the_chosen_runner_is_compared(checkpoint, loads, monkeypatch):
    assert open_model(checkpoint, runner="native").runner == "native"
    assert len(loads) == 1
    monkeypatch.setattr(reference, "_TOLERANCE", 0.0)
    with pytest.raises(UnsupportedArchitectureError, match="gives other logits than transformers"):
        open_model(checkpoint, runner="native", dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_with_a_cache_is_compared_too(checkpoint, monkeypatch, dtype):
    """The steps of a few tokens run in other code than whole sequences."""
    run = llama.Transformer.run_layers

    def wrong(self, h, start, stop, *, step):
        h = run(self, h, start, stop, step=step)
        return h + h.roll(1, dims=-1) if step.cache is not None and h.shape[1] == 1 else h

    monkeypatch.setattr(llama.Transformer, "run_layers", wrong)
    with pytest.warns(OfframpWarning, match="transformers runs this model, since the native"):
        load_weights(find_model(checkpoint), dtype=dtype)
