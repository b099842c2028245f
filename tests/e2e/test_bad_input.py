"""A user's mistake: exit code 2, one clear sentence, and nothing written."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from offramp import load_checkpoint

TRAIN = ["train", "--corpus", "pangram", "--steps", 2, "--dim", 16, "--heads", 2]


def refused(result, *expected):
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in expected:
        assert part in result.stderr
    return True


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--loss-weights", "asymmetric:1.5"], ["alpha", "from 0 to 1", "1.5"]),
        (["--loss-weights", "asymmetric:x"], ["a number", "'x'"]),
        (["--loss-weights", "1=-0.5,3=1"], ["at least 0", "-0.5"]),
        (["--loss-weights", "1=0,3=0"], ["at least one weight above 0"]),
        (["--loss-weights", "9=1"], ["layers from 1 to 3", "got 9"]),
        (["--loss-weights", "best"], ["'best'", "asymmetric:ALPHA"]),
        (["--exits", "0"], ["exits:", "1 to 3", "got 0"]),
        (["--exits", "4"], ["exits:", "1 to 3", "got 4"]),
        (["--exits", "1,x"], ["--exits", '"x"']),
        (["--heads", "3"], ["dim", "got 16"]),
        (["--device", "cuda:9"], ["device", "cuda:9"]),
        (["--device", "toaster"], ["device", "toaster"]),
        (["--threads", "0"], ["threads", "from 1 to 1024"]),
        (["--steps", "0"], ["steps", "at least 1"]),
        (["--lr", "nan"], ["lr", "nan"]),
        (["--seq-len", "5000", "--batch-size", "50"], ["250001", "got 100000"]),
        (["--select-at", "nan"], ["select_at", "nan"]),
        (["--nonsense", "1"], ["--nonsense"]),
    ],
)
def test_train_refuses(offramp, tmp_path, flags, expected):
    out = tmp_path / "model"
    arguments = [*TRAIN, "--layers", 3, "--out", out]
    replaced = [flag for flag in flags if flag in arguments]
    for flag in replaced:
        at = arguments.index(flag)
        del arguments[at : at + 2]
    assert refused(offramp(*arguments, *flags), *expected)
    assert not out.exists()


@pytest.mark.parametrize("command", ["train", "reproduce", "sweep"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no such path"),
        (b"", "empty"),
        (b"ab\xff\xfe\x80", "not UTF-8"),
        (b"x", "at least"),
    ],
)
def test_a_bad_corpus_is_refused(offramp, trained, tmp_path, command, content, expected):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "out"
    if content is not None:
        corpus.write_bytes(content)
    arguments = {
        "train": ["train", "--corpus", corpus, "--out", out],
        "reproduce": ["reproduce", "--corpus", corpus, "--out", out],
        "sweep": ["sweep", trained, "--corpus", corpus, "--out", out],
    }[command]
    assert refused(offramp(*arguments), str(corpus), expected)
    assert not out.exists()


def test_an_output_folder_with_another_run_is_refused_and_kept(offramp, tmp_path):
    (tmp_path / "results.json").write_text("mine")
    for arguments in ([*TRAIN, "--layers", 3], ["reproduce", "--quick"]):
        assert refused(offramp(*arguments, "--out", tmp_path), "another run", "choose another")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--thresholds", "0.5,high"], ["thresholds", "'0.5,high'"]),
        (["--thresholds", "nan"], ["threshold", "nan"]),
        (["--thresholds", "0.5:0.6:0.7"], ["expected 2", "got 3"]),
        (["--dtype", "float8"], ["--dtype", "float8"]),
        (["--out", "no/such/folder/x.json"], ["no/such/folder"]),
    ],
)
def test_sweep_refuses(offramp, trained, flags, expected):
    assert refused(offramp("sweep", trained, "--corpus", "pangram", *flags), *expected)


def test_sweep_refuses_what_is_no_model(offramp, trained, tmp_path):
    assert refused(offramp("sweep", tmp_path / "none", "--corpus", "pangram"), "found none")
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (broken / name).write_bytes((trained / name).read_bytes())
    (broken / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:1000])
    assert refused(offramp("sweep", broken, "--corpus", "pangram"), "model.safetensors")


def test_seeds_must_be_positive(offramp, tmp_path):
    out = tmp_path / "out"
    assert refused(offramp("reproduce", "--seeds", 0, "--out", out), "seeds", "got 0")
    assert not out.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_is_readable_and_goes_on(offramp, tmp_path, number, code):
    out = tmp_path / "a model"
    arguments = ["train", "--corpus", "pangram", "--layers", "2", "--dim", "16", "--heads", "2"]
    arguments += ["--steps", "1000000", "--eval-every", "5", "--seq-len", "16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "offramp.cli", *arguments, "--batch-size", "2", "--out", out],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert f"Resume with: offramp train --resume '{out}'\n" in stderr
    load_checkpoint(out)
    swept = offramp("sweep", out, "--corpus", "pangram")
    assert swept.returncode == 0
    assert "unfinished" in swept.stderr


def test_resume_refuses_what_it_cannot_go_on_with(offramp, trained, tmp_path):
    assert refused(offramp("train", "--resume", tmp_path / "none"), "found none")
    assert refused(offramp("train", "--resume", trained), "is finished")
    assert refused(offramp("train", "--resume", trained, "--lr", 9), "no other flag")
    assert refused(offramp("train", "--resume", trained, "--steps", 9), "more than the 30 steps")
    assert refused(offramp("train", "--corpus", "pangram"), "--out")


def test_resume_refuses_a_tokenizer_that_has_changed(offramp, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    path = run / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    assert refused(offramp("train", "--resume", run, "--steps", 60), "tokenizer that the run began")
