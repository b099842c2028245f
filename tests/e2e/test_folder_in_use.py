"""A failed run leaves no folder in the way, and one folder has one writer at a time."""

import shutil

import pytest

from offramp.commands import train as training
from offramp.errors import TrainingError
from offramp.folders import locked

RUN = ["train", "--corpus", "pangram", "--layers", 2, "--dim", 16, "--heads", 2, "--steps", 1]
RUN += ["--seq-len", 16, "--batch-size", 4, "--tracker", "none"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_run_that_fails_at_once_leaves_no_folder(offramp, tmp_path, monkeypatch, existing):
    def fail(*_, **__):
        raise TrainingError("step 1: expected a finite loss, got nan")

    out = tmp_path / "run"
    if existing:
        out.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(training, "train", fail)
        result = offramp(*RUN, "--out", out)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert list(tmp_path.rglob("*")) == ([out] if existing else [])
    assert offramp(*RUN, "--out", out).returncode == 0


def test_a_second_process_on_the_folder_of_a_run_gets_a_sentence(offramp, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    with locked(out):
        result = offramp("train", "--resume", out, "--steps", 40)
    assert result.returncode == 2
    assert "expected a folder that no other process writes to, but one does" in result.stderr
    assert offramp("train", "--resume", out, "--steps", 40).returncode == 0
