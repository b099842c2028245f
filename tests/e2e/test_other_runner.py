"""A checkpoint for which the native decoder is wrong runs in transformers, with one line."""

import dataclasses
import json
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from offramp.models.native import llama

COMMAND = ("7 quick brown", "--max-new-tokens", 4)


def test_one_line_says_that_transformers_runs_the_model(offramp, checkpoint, monkeypatch, tmp_path):
    right = llama.decoder_config

    def wrong(stored, **exits):
        return dataclasses.replace(right(stored, **exits), rope_theta=50.0)

    before = offramp("generate", checkpoint, *COMMAND)
    assert "transformers" not in before.stderr
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    monkeypatch.setattr(llama, "decoder_config", wrong)
    result = offramp("generate", checkpoint, *COMMAND)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "transformers" in line]
    assert lines == [
        f"offramp: {checkpoint}: transformers runs this model, since the native decoder gives "
        "other logits"
    ]
    assert result.stdout == before.stdout


def test_an_own_lm_head_decides_what_is_generated(offramp, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    shape = state["model.embed_tokens.weight"].shape
    state["lm_head.weight"] = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    result = offramp("generate", folder, "7 quick", "--max-new-tokens", 12, "--json")
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("7 quick").ids
    expected = lm.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)
    found = [token["id"] for token in json.loads(result.stdout)["tokens"]]
    assert found == expected[0, len(ids) :].tolist()
