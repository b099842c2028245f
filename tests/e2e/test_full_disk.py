"""A full disk is one sentence; what was there before stays, and no temporary file is left.

The disk is a small file system in memory, which is filled before the command runs.
"""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from offramp import load_checkpoint

TEXT = "".join(
    f"{number} quick brown foxes jump over {number * 7 % 31} lazy dogs. " for number in range(120)
)
TRAIN = [*("--layers", 2, "--dim", 16, "--heads", 2, "--exits", 1, "--steps", 4)]
TRAIN += ["--seq-len", 16, "--batch-size", 4, "--eval-every", 2, "--checkpoint-every", 2]


def content(folder: Path) -> dict[str, str]:
    """The files of a folder, by hash; a folder is a file without content."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        )
        for path in sorted(folder.rglob("*"))
        if path.name != "filler"
    }


def fill(disk: Path, *, keep: int = 0) -> None:
    """Write a file that leaves only ``keep`` bytes of the disk free."""
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - keep))


def refused(result, *expected: str) -> None:
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    sentence = result.stderr.splitlines()[-1]
    for part in ("offramp: ", "cannot be written", "No space left on device", *expected):
        assert part in sentence, result.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def model(offramp, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    result = offramp("train", "--corpus", text, *TRAIN, "--tracker", "none", "--out", out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A task of lm-evaluation-harness with one document."""
    path = tmp_path_factory.mktemp("task") / "task.yaml"
    path.with_suffix(".jsonl").write_text('{"text": "7 quick brown", "words": [" foxes"]}\n')
    path.write_text(
        "{task: own, dataset_path: json, dataset_kwargs: {data_files: {test: task.jsonl}}, "
        "test_split: test, output_type: multiple_choice, doc_to_text: text, "
        "doc_to_choice: words, doc_to_target: 0}"
    )
    return path


WRITERS = {
    "train": ["train", "--corpus", "TEXT", *TRAIN, "--out", "DISK/new"],
    "tune": ["tune", "CHECKPOINT", "--corpus", "TEXT", "--tokens", 200, "--out", "DISK/new"],
    "tune --unfreeze": [
        *("tune", "CHECKPOINT", "--corpus", "TEXT", "--tokens", 200, "--unfreeze"),
        *("--seq-len", 32, "--out", "DISK/new"),
    ],
    "specialise": [
        *("specialise", "MODEL", "--corpus", "TEXT", "--compute-budget", 95, "--steps", 2),
        *("--tokens", 200, "--out", "DISK/new"),
    ],
    "confidence --fit": ["confidence", "DISK/model", "--corpus", "TEXT", "--fit", "TEXT"],
    "confidence": ["confidence", "MODEL", "--corpus", "TEXT", "--out", "DISK/before"],
    "generate": [
        *("generate", "MODEL", "The ", "--max-new-tokens", 4, "--threshold", 0),
        *("--audit", 0.5, "--audit-log", "DISK/new"),
    ],
    "calibrate": ["calibrate", "MODEL", "--corpus", "TEXT", "--out", "DISK/before"],
    "sweep": ["sweep", "MODEL", "--corpus", "TEXT", "--out", "DISK/before"],
    "probe": ["probe", "MODEL", "--corpus", "TEXT", "--out", "DISK/before"],
    "evaluate": ["evaluate", "MODEL", "--tasks", "TASK", "--out", "DISK/before"],
    "card": ["card", "MODEL", "--out", "DISK/new"],
    "quantise": ["quantise", "MODEL", "--weights", "int8", "--out", "DISK/new"],
    "export": ["export", "CHECKPOINT", "--exit", 2, "--out", "DISK/new"],
    "plot": ["plot", "SWEPT", "--out", "DISK/before.svg"],
    "study": ["study", "alpha", "--corpus", "python-docs", "--tokens", 4096, "--out", "DISK/new"],
    "recipe": ["recipe", "--corpus", "python-docs", "--tokens", 12288, "--out", "DISK/new"],
    "reproduce": ["reproduce", "--corpus", "pangram", "--seeds", 1, "--out", "DISK/new"],
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_command_says_in_a_sentence_that_the_disk_is_full(
    offramp, small_disk, model, checkpoint, text, task, tmp_path, name
):
    swept = tmp_path / "swept.json"
    if name == "plot":
        assert offramp("sweep", model, "--corpus", text, "--out", swept).returncode == 0
    for before in ("before", "before.svg"):
        (small_disk / before).write_text("before")
    if "DISK/model" in WRITERS[name]:
        shutil.copytree(model, small_disk / "model", ignore=lambda *_: ["checkpoints", "last"])
    places = {"MODEL": model, "CHECKPOINT": checkpoint, "TEXT": text, "SWEPT": swept}
    places["TASK"] = task
    arguments = [
        places.get(str(part), str(part).replace("DISK", str(small_disk))) for part in WRITERS[name]
    ]
    fill(small_disk)
    before = content(small_disk)
    refused(offramp(*arguments))
    assert content(small_disk) == before


def test_a_run_whose_first_checkpoint_does_not_fit_leaves_no_folder(offramp, small_disk, text):
    fill(small_disk, keep=32_000)
    run = ["train", "--corpus", text, *TRAIN, "--tracker", "none", "--out", small_disk / "run"]
    refused(offramp(*run))
    assert content(small_disk) == {}
    (small_disk / "filler").unlink()
    assert offramp(*run).returncode == 0


@pytest.mark.parametrize("free", range(0, 120_000, 24_000))
def test_a_run_keeps_its_last_good_checkpoint_and_says_how_to_resume(
    offramp, small_disk, model, text, free, tmp_path
):
    """Extended where nothing is full, and on a disk that is full sooner or later."""
    alone, run = tmp_path / "alone", small_disk / "run"
    shutil.copytree(model, alone)
    shutil.copytree(model, run)
    assert offramp("train", "--resume", alone, "--steps", 8).returncode == 0
    fill(small_disk, keep=free)
    result = offramp("train", "--resume", run, "--steps", 8)
    if result.returncode:
        assert not list(run.rglob(".*"))
        assert offramp("sweep", run, "--corpus", text).returncode == 0
        if (run / "unfinished.json").exists():
            refused(result, f"resume with: offramp train --resume {run}")
            (small_disk / "filler").unlink()
            assert offramp("train", "--resume", run).returncode == 0
        else:
            refused(result)
            (small_disk / "filler").unlink()
            assert offramp("train", "--resume", run, "--steps", 8).returncode == 0
    for part in (".", "last"):
        found, expected = (
            load_checkpoint(folder / part)[0].state_dict() for folder in (run, alone)
        )
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_log_of_a_tracker_on_a_full_disk_is_a_sentence(offramp, small_disk, text, tmp_path):
    """TensorBoard writes in a thread of its own, whose error comes back at a later call."""
    run = tmp_path / "run"
    started = offramp("train", "--corpus", text, *TRAIN, "--out", run)
    assert started.returncode == 0, started.stderr
    shutil.rmtree(run / "logs")
    (run / "logs").symlink_to(small_disk)
    fill(small_disk)
    refused(offramp("train", "--resume", run, "--steps", 200), f"--resume {run}")
    (small_disk / "filler").unlink()
    assert offramp("train", "--resume", run).returncode == 0


@pytest.mark.parametrize("free", [200_000, 270_000, 300_000])
def test_a_run_that_does_not_fit_can_be_resumed_later(offramp, small_disk, text, free):
    """The best model, a checkpoint and the last model are written in turn."""
    fill(small_disk, keep=free)
    out = small_disk / "run"
    result = offramp("train", "--corpus", text, *TRAIN, "--out", out)
    refused(result, f"resume with: offramp train --resume {out}")
    assert not list(out.rglob(".*"))
    (small_disk / "filler").unlink()
    assert offramp("train", "--resume", out).returncode == 0


def test_a_full_cache_is_done_without_and_one_line_says_so(
    offramp, small_disk, text, tmp_path, monkeypatch
):
    monkeypatch.setenv("OFFRAMP_CACHE", str(small_disk))
    fill(small_disk)
    run = ["train", "--corpus", text, *TRAIN, "--tracker", "none", "--out", tmp_path / "run"]
    result = offramp(*run)
    assert result.returncode == 0, result.stderr
    assert "tokens cannot be stored there (No space left on device)" in result.stderr
    assert not list((small_disk / "tokens").glob(".*"))
