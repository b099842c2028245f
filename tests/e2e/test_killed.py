"""A training run killed without a word at random moments ends where one left alone ends."""

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from offramp import load_checkpoint
from offramp.cli import main

KILLS, INSIDE_A_WRITE = 20, 8
STEPS = 120
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["offramp.cli.app", "offramp.cli.train", "offramp.commands.train", "offramp.report.progress"]
)


def start(*arguments):
    process = PROCESSES.Process(target=main, args=([*map(str, arguments), "--threads", "1"],))
    process.start()
    return process


def finish(process) -> None:
    process.join(120)
    assert process.exitcode == 0


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {
        f"{folder} {name}": tensor
        for folder in ("best", "last")
        for name, tensor in load_checkpoint(out if folder == "best" else out / folder)[0]
        .state_dict()
        .items()
    }


def kill_inside_a_write(process, out: Path, chance: random.Random) -> None:
    """Wait for some checkpoint to be under way, then up to the time that one takes."""
    for _ in range(chance.randint(1, 6)):
        begun = time.monotonic()
        while not list(out.glob("checkpoints/.step-*.tmp")) and time.monotonic() < begun + 30:
            pass
        seen = time.monotonic()
        while time.monotonic() < seen + chance.uniform(0, 0.003):
            pass
    process.kill()


def test_a_run_killed_before_it_is_marked_as_finished_resumes(offramp, trained, tmp_path):
    """Between ``last/`` and the end of ``unfinished.json``; extended runs by the same command."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    extend = ("train", "--resume", out, "--steps", 40)
    commands = {("train", "--resume", out): trained, extend: None}
    for command, same in commands.items():
        if same is None:
            assert offramp(*command).returncode == 0
        expected = weights(same or out)
        for lost in ((), ("last",)):
            (out / "run.json").rename(out / "unfinished.json")
            for name in lost:
                shutil.rmtree(out / name)
            result = offramp(*command)
            assert result.returncode == 0, result.stderr
            found = weights(out)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            assert not (out / "unfinished.json").exists()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path, capfd):
    corpus = tmp_path / "text.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    arguments = ["train", "--corpus", corpus, "--layers", 3, "--dim", 32, "--heads", 2]
    arguments += ["--exits", 1, "--steps", STEPS, "--seq-len", 16, "--batch-size", 4]
    arguments += ["--layer-dropout", 0.2, "--eval-every", 40, "--checkpoint-every", 5]
    arguments += ["--tracker", "none"]
    finish(start(*arguments, "--out", tmp_path / "warm"))  # the corpus is tokenised, once
    begun = time.monotonic()
    finish(start(*arguments, "--out", tmp_path / "alone"))
    whole_run = time.monotonic() - begun
    expected = weights(tmp_path / "alone")

    chance = random.Random(0)
    begun_writes = 0
    for kill in range(KILLS):
        out = tmp_path / f"killed-{kill}"
        process = start(*arguments, "--out", out)
        if kill < INSIDE_A_WRITE:
            kill_inside_a_write(process, out, chance)
        else:
            time.sleep(chance.uniform(0, whole_run))
            process.kill()
        process.join()
        begun_writes += bool(list(out.glob("checkpoints/.step-*.tmp")))
        if (out / "unfinished.json").exists():
            finish(start("train", "--resume", out))
        elif process.exitcode != 0 and not list(tmp_path.glob(f"{out.name}/last/config.json")):
            assert not out.exists() or not any(out.iterdir())  # killed before it began
            finish(start(*arguments, "--out", out))
        found = weights(out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), kill
        assert not list(out.glob("checkpoints/.step-*.tmp"))
    assert begun_writes, "no kill fell inside a checkpoint write"
