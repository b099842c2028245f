"""Sizes that are valid numbers but fit no machine: one sentence at once, and no memory is taken.

A number of layers, of positions, of tokens of BPE; a width of 10^7; and an environment that names
no folder.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from offramp.cache import cache_folder
from offramp.errors import ConfigError

HUGE = (10**7, 10**9, 10**12, 2**62)


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize("flag", ["--dim", "--layers", "--head-dim", "--hidden", "--max-length"])
def test_a_model_that_fits_no_memory_is_refused_at_once(in_order, world, tmp_path, flag, size):
    out = tmp_path / "out"
    result = in_order("train", "--corpus", world / "text.txt", "--out", out, flag, size, out=out)
    assert result.returncode == 2
    assert len(result.stderr) < 1200
    assert "frame" not in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("spec", ["bpe:1048577", "bpe:1000000000000", f"bpe:{'9' * 5000}"])
def test_more_tokens_than_a_machine_can_count_are_refused(in_order, world, tmp_path, spec):
    out = tmp_path / "out"
    result = in_order(
        *("train", "--corpus", world / "text.txt", "--out", out, "--tokenizer", spec), out=out
    )
    assert result.returncode == 2
    assert "expected bpe:N with N at least 257 and at most 1048576" in result.stderr


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize("field", ["head_dim", "max_position_embeddings", "num_hidden_layers"])
@pytest.mark.parametrize("model", ["native", "checkpoint"])
def test_a_size_of_a_stored_config_takes_no_memory(in_order, world, tmp_path, model, field, size):
    folder = tmp_path / "model"
    shutil.copytree(world / model, folder)
    content = json.loads((folder / "config.json").read_text())
    content.get("model", content)[field] = size
    (folder / "config.json").write_text(json.dumps(content))
    result = in_order("sweep", folder, "--corpus", world / "small.txt")
    assert len(result.stderr) < 1200
    if field != "max_position_embeddings" or (model == "native" and size > HUGE[0]):  # else it fits
        assert result.returncode == 2


def test_a_cache_folder_of_an_unknown_user_is_named_and_an_empty_one_is_none(monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", "~/x")
    assert "~" not in str(cache_folder("tokens"))
    monkeypatch.setenv("OFFRAMP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder("tokens").is_absolute()
    for name in ("XDG_CACHE_HOME", "OFFRAMP_CACHE"):
        monkeypatch.setenv(name, "~nobody-of-this-name/x")
        with pytest.raises(ConfigError, match=f"{name}: expected a folder of a known user"):
            cache_folder("tokens")


def test_python_without_docstrings_is_refused_in_a_sentence():
    result = subprocess.run(
        [sys.executable, "-OO", "-m", "offramp", "plot", "x.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("offramp: Python: expected its docstrings")
    assert result.stderr.count("\n") == 1


def test_a_terminal_of_no_columns_gets_every_sentence(world):
    command = [sys.executable, "-m", "offramp", "sweep", str(world / "checkpoint")]
    result = subprocess.run(
        [*command, "--corpus", str(world / "small.txt")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "0"},
    )
    assert result.returncode == 0
    assert "its exits were never trained" in result.stderr


@pytest.mark.parametrize(
    "changes",
    [{"num_labels": 10**9}, {"vision_config": {"num_hidden_layers": 10**9}}],
)
def test_a_number_of_which_a_library_makes_a_list_is_refused(in_order, world, tmp_path, changes):
    folder = tmp_path / "model"
    shutil.copytree(world / "checkpoint", folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))
    result = in_order("probe", folder, "--corpus", world / "small.txt")
    assert result.returncode == 2
    assert "expected at most 100000, got 1000000000" in result.stderr


def test_a_sentence_has_an_end(in_order, world, tmp_path):
    config = tmp_path / "flags.json"
    config.write_text(json.dumps({f"key{number}": 1 for number in range(10_000)}))
    result = in_order(
        *("train", "--corpus", world / "text.txt", "--out", tmp_path / "out", "--config", config)
    )
    assert result.returncode == 2
    assert len(result.stderr) < 4100
