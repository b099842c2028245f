"""Exits and their backbone are found after they were copied together, or by --base."""

import json
import shutil

import pytest

from offramp import load
from offramp.errors import CheckpointError, ConfigError
from offramp.models.huggingface.places import place_of
from offramp.models.model_files import find_model
from offramp.models.open import open_model
from offramp.models.sources import Source


@pytest.fixture(scope="module")
def tuned(offramp, checkpoint, tmp_path_factory):
    """The folder ``work``, with a checkpoint and its exits in several places."""
    work = tmp_path_factory.mktemp("exits") / "work"
    shutil.copytree(checkpoint, work / "models" / "base")
    for out in ("models/beside", "models/base/inside", "runs/apart"):
        result = offramp(
            *("tune", work / "models" / "base", "--corpus", checkpoint / "text.txt"),
            *("--exits", "1,2", "--seq-len", 32, "--epochs", 1, "--out", work / out),
        )
        assert result.returncode == 0, result.stderr
    return work


def stored(folder):
    return json.loads((folder / "offramp.json").read_text())["base"]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("models/beside", "../base"),
        ("models/base/inside", ".."),
        ("runs/apart", "../../models/base"),
    ],
)
def test_both_can_be_copied_together(offramp, tuned, tmp_path, monkeypatch, place, name):
    assert stored(tuned / place)["id"] == name
    expected = open_model(tuned / place).sha256
    copy = shutil.copytree(tuned, tmp_path / "copy")
    hidden = tuned.rename(tuned.with_name("hidden"))
    try:
        opened = open_model(copy / place)
        assert opened.sha256 == expected
        assert opened.files.backbone.folder == copy / "models" / "base"
        monkeypatch.chdir(copy / place)  # the working folder does not matter
        result = offramp("generate", ".", "7 quick", "--max-new-tokens", 2)
        assert result.returncode == 0, result.stderr
        link = tmp_path / "link"
        link.symlink_to(copy / place)
        assert open_model(link).sha256 == expected
    finally:
        hidden.rename(tuned)


def test_a_base_inside_the_folder_of_exits_is_named_relative(tuned, tmp_path):
    outer = shutil.copytree(tuned / "models" / "beside", tmp_path / "outer")
    inner = shutil.copytree(tuned / "models" / "base", outer / "base")
    place = place_of(Source(id=str(inner), folder=inner), outer)
    assert place == {"id": "./base", "folder": str(inner.resolve())}


def test_exits_that_are_moved_alone_find_the_base_where_it_was(tuned, tmp_path):
    alone = shutil.copytree(tuned / "models" / "beside", tmp_path / "else" / "where")
    assert open_model(alone).sha256 == open_model(tuned / "models" / "beside").sha256


COMMANDS = {
    "sweep": ("--corpus", "TEXT"),
    "probe": ("--corpus", "TEXT", "--tokens", 300),
    "confidence": ("--corpus", "TEXT"),
    "calibrate": ("--corpus", "TEXT"),
    "generate": ("7 quick brown", "--max-new-tokens", 3),
    "bench": (
        *("--corpus", "TEXT", "--prompts", 1, "--repeats", 1, "--prompt-tokens", 8),
        *("--max-new-tokens", 4, "--no-peers"),
    ),
    "export": ("--exit", 4, "--out", "OUT"),
    "specialise": (
        *("--corpus", "TEXT", "--steps", 1, "--tokens", 500, "--compute-budget", 99),
        *("--out", "OUT"),
    ),
}


@pytest.fixture
def lost(tuned, tmp_path):
    """Exits whose backbone is neither beside them nor where it was."""
    folder = shutil.copytree(tuned / "models" / "beside", tmp_path / "lost")
    about = json.loads((folder / "offramp.json").read_text())
    about["base"] |= {"id": "../gone", "folder": str(tmp_path / "gone, too")}
    (folder / "offramp.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_base(offramp, tuned, lost, tmp_path, command):
    words = {"TEXT": tuned / "models/base/text.txt", "OUT": tmp_path / "out"}
    arguments = [words.get(word, word) for word in COMMANDS[command]]
    result = offramp(command, lost, *arguments)
    assert result.returncode == 2
    assert "its exits need another model, whose place --base can name" in result.stderr
    result = offramp(command, lost, *arguments, "--base", tuned / "models" / "base")
    assert result.returncode == 0, result.stderr


def test_load_takes_base_and_its_hash_must_match(tuned, lost, checkpoint, tmp_path):
    base = tuned / "models" / "base"
    assert load(lost, base=base).sha256 == load(tuned / "models" / "beside").sha256
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(
        CheckpointError, match=r"its exits were trained on .* but its sha256 is now"
    ):
        load(lost, base=other)
    with pytest.raises(CheckpointError, match="expected a folder with a checkpoint, found none"):
        load(lost, base=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="base: expected none without a folder of exits"):
        load(base, base=base)


def test_a_folder_with_its_place_in_full_still_opens(tuned, lost):
    """As older versions wrote it."""
    about = json.loads((lost / "offramp.json").read_text())
    about["base"] = {
        "id": str(tuned / "models" / "base"),
        "sha256": about["base"]["sha256"],
    }
    (lost / "offramp.json").write_text(json.dumps(about))
    assert find_model(lost).backbone.folder == tuned / "models" / "base"


def test_a_changed_config_of_the_backbone_is_said(offramp, tuned, tmp_path):
    copy = shutil.copytree(tuned, tmp_path / "copy")
    path = copy / "models" / "base" / "config.json"
    config = json.loads(path.read_text())
    for field, value, said in (
        ("transformers_version", "5.0.0", False),
        ("dtype", "bfloat16", False),
        ("rms_norm_eps", 0.1, True),
    ):
        path.write_text(json.dumps(config | {field: value}))
        for runner in ("models/beside", "models/base/inside"):
            result = offramp("generate", copy / runner, "7 quick", "--max-new-tokens", 2)
            assert result.returncode == 0, result.stderr
            assert result.stderr.count("trained with another config.json") == said
    path.write_text(json.dumps(config))
    tokenizer = path.with_name("tokenizer.json")
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    permuted = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    content["model"]["vocab"] = permuted
    tokenizer.write_text(json.dumps(content))
    result = offramp("generate", copy / "models/beside", "7 quick", "--max-new-tokens", 2)
    assert "trained with another tokenizer.json" in result.stderr
