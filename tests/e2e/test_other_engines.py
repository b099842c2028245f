"""Backbones and exported exits are plain checkpoints: ``AutoModelForCausalLM`` says the same."""

import pytest
import torch
from torch.testing import assert_close

from offramp import load
from offramp.models.base import whole_step

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[5, 3, 8, 1, 9, 2, 7], [1, 1, 2, 3, 5, 8, 13]])


def logits_at(model, layer):
    with torch.no_grad():
        [(_, h)] = model.states_at(IDS, [layer], step=whole_step(IDS))
        return model.unembed(h, layer)


def plain(folder):
    """The model and its tokenizer as every program reads them; no tensor is left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


def assert_says(folder, lm, layer):
    model, tokenizer = plain(folder)
    assert model.config.num_hidden_layers == layer
    with torch.no_grad():
        assert_close(model(IDS).logits, logits_at(lm.model, layer), rtol=1e-4, atol=1e-4)
    assert tokenizer("7 quick brown", add_special_tokens=False).input_ids == (
        lm.tokenizer.encode("7 quick brown", add_special_tokens=False).ids
    )


@pytest.fixture(scope="module", params=["shared", "norm", "full"])
def tuned(request, offramp, checkpoint, tmp_path_factory):
    """A folder of exits with heads that a plain checkpoint can hold, and the whole model."""
    out = tmp_path_factory.mktemp("tuned") / request.param
    options = ("--unfreeze", "--lr", 0.003) if request.param == "shared" else ("--epochs", 1)
    made = offramp(
        *("tune", checkpoint, "--corpus", checkpoint / "text.txt", "--tokens", 500),
        *("--exits", "1,2", "--exit-head", request.param, "--seq-len", 32, "--no-gates"),
        *(*options, "--out", out),
    )
    assert made.returncode == 0, made.stderr
    return out


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_every_exit_of_a_tuned_model(tuned, layer, offramp, tmp_path):
    lm = load(tuned)
    assert offramp("export", tuned, "--exit", layer, "--out", tmp_path / "x").returncode == 0
    assert_says(tmp_path / "x", lm, layer)


def test_the_backbone_that_unfreeze_writes(tuned):
    if (tuned / "model.safetensors").exists():
        assert_says(tuned, load(tuned), 4)


@pytest.mark.parametrize("layer", [2, 3])
def test_every_exit_of_a_model_of_offramp_train(layer, offramp, checkpoint, tmp_path):
    made = offramp(
        *("train", "--corpus", checkpoint / "text.txt", "--layers", 3, "--dim", 16),
        *("--heads", 2, "--exits", 2, "--exit-head", "norm", "--steps", 3, "--seq-len", 32),
        *("--batch-size", 4, "--tracker", "none", "--out", tmp_path / "model"),
    )
    assert made.returncode == 0, made.stderr
    lm = load(tmp_path / "model")
    made = offramp("export", tmp_path / "model", "--exit", layer, "--out", tmp_path / "x")
    assert made.returncode == 0, made.stderr
    assert_says(tmp_path / "x", lm, layer)
