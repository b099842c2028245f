"""No command drops tensors of a checkpoint without a word: each refuses them by name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp import load
from offramp.errors import CheckpointError

COMMANDS = {
    "probe": ("--corpus", "TEXT", "--tokens", 300),
    "sweep": ("--corpus", "TEXT"),
    "tune": ("--corpus", "TEXT", "--exits", 2, "--seq-len", 32, "--out", "OUT"),
    "calibrate": ("--corpus", "TEXT"),
    "confidence": ("--corpus", "TEXT"),
    "generate": ("7 quick brown", "--max-new-tokens", 3),
    "bench": ("--corpus", "TEXT", "--no-peers"),
    "export": ("--exit", 4, "--out", "OUT"),
}


@pytest.fixture(scope="module")
def biased(checkpoint, tmp_path_factory):
    """A Llama whose file has biases of the queries, for which its config has no place."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("biased") / "model")
    state = load_file(folder / "model.safetensors")
    biases = {f"model.layers.{n}.self_attn.q_proj.bias": torch.ones(32) for n in range(4)}
    save_file(state | biases, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_biases_that_the_config_does_not_know_are_refused(offramp, biased, tmp_path, command):
    words = {"TEXT": biased / "text.txt", "OUT": tmp_path / "out"}
    result = offramp(command, biased, *(words.get(word, word) for word in COMMANDS[command]))
    assert result.returncode == 2
    assert "they have an unknown model.layers.0.self_attn.q_proj.bias" in result.stderr
    assert not (tmp_path / "out").exists()


def test_load_refuses_them_too(biased):
    with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
        load(biased)
