import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from offramp import load_checkpoint
from offramp.commands import train as train_command
from offramp.training.loop import TrainResult
from offramp.training.metrics_file import read_metrics

UNFINISHED_RESULT = TrainResult(step=0, validations=(), finished=False)


def test_train_leaves_the_best_and_the_last_whole(trained):
    assert {path.name for path in trained.iterdir()} == {
        "checkpoints",
        "config.json",
        "last",
        "logs",
        "metrics.csv",
        "model.safetensors",
        "run.json",
        "tokenizer.json",
    }
    model, about = load_checkpoint(trained)
    assert model.exit_layers == (1, 2, 4)
    assert about["training"]["loss_weights"] == "1=0.3,2=0,4=0.7"
    assert about["corpus"]["name"] == "pangram"
    load_checkpoint(trained / "last")


def test_sweep_writes_what_it_prints(offramp, trained, tmp_path):
    out = tmp_path / "sweep.json"
    result = offramp(
        *("sweep", trained, "--corpus", "pangram", "--out", out),
        *("--thresholds", "-inf,0.3,0.95,1.01,0.2:0.5,inf"),
    )
    assert result.returncode == 0, result.stderr
    content = json.loads(out.read_text())
    assert content["num_layers"] == 4
    assert content["exit_layers"] == [1, 2, 4]
    assert content["n_tokens"] == 110_000 - 1
    rows = content["rows"]
    assert [row["threshold"] for row in rows] == ["-inf", 0.3, 0.95, 1.01, [0.2, 0.5], "inf"]
    for row in rows:
        share = row["exit_share"]
        assert sum(share.values()) == pytest.approx(1.0)
        assert row["compute_pct"] == pytest.approx(
            100 * sum(int(layer) * part for layer, part in share.items()) / 4
        )
        assert row["shallow_pct"] == pytest.approx(100 * (share["1"] + share["2"]))
    assert rows[0]["exit_share"] == {"1": 1.0, "2": 0.0, "4": 0.0}
    assert rows[0]["ppl"] == pytest.approx(content["exit_ppl"]["1"])
    for full in (rows[3], rows[5]):
        assert full["compute_pct"] == 100.0
        assert full["ppl"] == pytest.approx(content["exit_ppl"]["4"])
    assert "Compute%" in result.stdout
    assert "10,000" in result.stderr or "<unk>" in result.stderr  # the letter A


def test_the_same_seed_gives_the_same_weights(offramp, tmp_path):
    arguments = ["train", "--corpus", "pangram", "--layers", 2, "--dim", 16, "--heads", 2]
    arguments += ["--steps", 6, "--seq-len", 32, "--batch-size", 4, "--threads", 1]
    states = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        result = offramp(*arguments, "--seed", seed, "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr
        states.append(load_checkpoint(tmp_path / name / "last")[0].state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_recommended_brings_its_exit_and_its_threshold(offramp, tmp_path):
    out = tmp_path / "model"
    result = offramp(
        *("train", "--corpus", "pangram", "--layers", 6, "--dim", 16, "--heads", 2),
        *("--exits", "2,4", "--loss-weights", "recommended", "--steps", 2),
        *("--seq-len", 16, "--batch-size", 4, "--out", out),
    )
    assert result.returncode == 0, result.stderr
    model, about = load_checkpoint(out)
    assert model.exit_layers == (1, 2, 4, 6)
    assert about["training"]["select_at"] == 0.95


def test_a_killed_run_ends_where_one_left_alone_ends(offramp, tmp_path):
    """Killed without a word (SIGKILL), in the middle of a run; the corpus is a file."""
    corpus = tmp_path / "text.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    arguments = ["train", "--corpus", corpus, "--layers", 3, "--dim", 16, "--heads", 2]
    arguments += ["--exits", 1, "--steps", 300, "--seq-len", 16, "--batch-size", 4]
    arguments += ["--eval-every", 50, "--checkpoint-every", 7, "--threads", 1]
    assert offramp(*arguments, "--out", tmp_path / "alone").returncode == 0

    out = tmp_path / "killed"
    command = [sys.executable, "-m", "offramp.cli", *map(str, arguments), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (out / "unfinished.json").exists()
    result = offramp("train", "--resume", out, "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert not (out / "unfinished.json").exists()
    for folder in ("", "last"):
        expected = load_checkpoint(tmp_path / "alone" / folder)[0].state_dict()
        found = load_checkpoint(out / folder)[0].state_dict()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_does_not_go_on_with_another_corpus(offramp, tmp_path):
    corpus = tmp_path / "text.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    out = tmp_path / "model"
    arguments = ["train", "--corpus", corpus, "--layers", 2, "--dim", 16, "--heads", 2]
    arguments += ["--steps", 4, "--seq-len", 16, "--batch-size", 4, "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_command, "train", lambda *_, **__: UNFINISHED_RESULT)
        assert offramp(*arguments).returncode == 130
    corpus.write_text("another text altogether\n" * 400)
    result = offramp("train", "--resume", out)
    assert result.returncode == 2
    assert len(re.findall(r"[0-9a-f]{64}", result.stderr)) == 2


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_subwords_and_bytes_train_and_sweep(offramp, tmp_path, tokenizer):
    out = tmp_path / "model"
    result = offramp(
        *("train", "--corpus", "python-docs", "--tokenizer", tokenizer, "--layers", 2),
        *("--dim", 16, "--heads", 2, "--steps", 3, "--seq-len", 32, "--batch-size", 4),
        *("--eval-every", 3, "--out", out),
    )
    assert result.returncode == 0, result.stderr
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return 'é🙂'\n" * 20, encoding="utf-8")
    swept = offramp("sweep", out, "--corpus", text, "--out", tmp_path / "s.json")
    assert swept.returncode == 0, swept.stderr
    assert json.loads((tmp_path / "s.json").read_text())["unknown_tokens"] == 0


def test_a_finished_run_is_extended_as_if_it_had_been_that_long(offramp, tmp_path):
    shape = ("--corpus", "pangram", "--layers", 2, "--dim", 16, "--heads", 2, "--exits", 1)
    training = ("--seq-len", 16, "--batch-size", 8, "--eval-every", 10, "--tracker", "none")
    long, short = tmp_path / "long", tmp_path / "a short run"
    for out, steps in ((long, 40), (short, 20)):
        result = offramp("train", *shape, *training, "--steps", steps, "--out", out)
        assert result.returncode == 0, result.stderr
    assert "parameters, trained on 2,560 tokens" in result.stderr
    assert f"offramp sweep '{short}'" in result.stderr
    again = offramp("train", "--resume", short)
    assert again.returncode == 2
    assert "--steps N extends it" in again.stderr
    for steps, said in ((20, "more than the 20 steps"), (0, "at least 1")):
        assert said in offramp("train", "--resume", short, "--steps", steps).stderr
    assert offramp("train", "--resume", short, "--steps", 40, "--lr", 1).returncode == 2
    extended = offramp("train", "--resume", short, "--steps", 40)
    assert extended.returncode == 0, extended.stderr
    for name in ("model.safetensors", "last/model.safetensors"):
        mine, theirs = load_file(short / name), load_file(long / name)
        assert set(mine) == set(theirs)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    config = json.loads((short / "config.json").read_text())
    assert config["training"]["steps"] == 40
    steps = [int(row["step"]) for row in read_metrics(short / "metrics.csv")]
    assert steps == [10, 20, 30, 40]


@pytest.mark.parametrize(
    "damage",
    [
        {"run": 7},
        {"run": {}},
        {"run": {"training": [], "model": {}}},
        {"run": {"training": {"select_at": "x", "alpha_steps": []}, "model": {}}},
        {"run": {"training": {"select_at": None, "alpha_steps": 3}, "model": {}}},
        {"run": {"training": {"select_at": None, "alpha_steps": [], "steps": "x"}, "model": {}}},
    ],
)
def test_a_damaged_description_of_a_run_is_one_sentence(offramp, trained, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    stored = json.loads((folder / "run.json").read_text())
    (folder / "unfinished.json").write_text(json.dumps({**stored, **damage}))
    for flags in ((), ("--steps", 60)):
        result = offramp("train", "--resume", folder, *flags)
        assert result.returncode == 2, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert "unfinished.json" in result.stderr


def test_a_run_that_patience_stopped_is_not_extended(offramp, tmp_path):
    out = tmp_path / "model"
    shape = ("--corpus", "pangram", "--layers", 1, "--dim", 16, "--heads", 2, "--exits", 1)
    training = ("--seq-len", 16, "--batch-size", 8, "--eval-every", 5, "--tracker", "none")
    stop = ("--patience", 0, "--lr", "0.5", "--steps", 400)
    result = offramp("train", *shape, *training, *stop, "--out", out)
    assert result.returncode == 0, result.stderr
    before = (out / "config.json").read_bytes()
    refused = offramp("train", "--resume", out, "--steps", 500)
    assert refused.returncode == 2
    assert "stopped by --patience" in refused.stderr
    assert (out / "config.json").read_bytes() == before
    assert (out / "run.json").exists()


def test_weights_obey_the_umask(trained):
    written = [*trained.rglob("*.safetensors"), *trained.rglob("*.json")]
    assert len(written) > 4
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~current_umask()}


def current_umask():
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_an_unfinished_run_is_named_with_the_command_that_continues_it(offramp, trained, tmp_path):
    folder = tmp_path / "an unfinished run"
    shutil.copytree(trained, folder)
    (folder / "run.json").rename(folder / "unfinished.json")
    for command in (
        ("sweep", folder, "--corpus", "pangram"),
        ("generate", folder, "The", "--max-new-tokens", 2),
    ):
        result = offramp(*command)
        assert result.returncode == 0, result.stderr
        assert f"{folder}: its training run is unfinished" in result.stderr
        assert f"offramp train --resume '{folder}'" in result.stderr


def test_a_sweep_is_written_as_csv_and_ends_in_a_verdict(offramp, trained, tmp_path):
    out = tmp_path / "a sweep.csv"
    flags = ("--corpus", "pangram", "--thresholds", "0.5,0.9:0.8", "--out", out)
    result = offramp("sweep", trained, *flags)
    assert result.returncode == 0, result.stderr
    first, second = csv.DictReader(out.read_text().splitlines())
    assert second["threshold"] == "0.9:0.8"
    assert float(first["flops_pct"]) > float(first["compute_pct"])
    assert "PPL" in result.stdout.splitlines()[-1]
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80


def test_confidence_chooses_the_unit_of_the_thresholds(offramp, trained):
    result = offramp("sweep", trained, "--corpus", "pangram", "--confidence", "patience")
    assert result.returncode == 0, result.stderr
    assert "thresholds on patience" in result.stdout
    assert offramp("sweep", trained, "--corpus", "pangram", "--confidence", "").returncode == 2
    refused = offramp("sweep", trained, "--corpus", "pangram", "--confidence", "gain")
    assert refused.returncode == 2
    assert "a fitted gain" in refused.stderr
