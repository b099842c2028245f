"""``torchrun -m offramp train`` in two processes, run as a user runs it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from offramp import load_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
TORCHRUN += ["--local-addr", "127.0.0.1", "-m", "offramp"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("corpus") / "text.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return [
        *("train", "--corpus", corpus, "--tokenizer", "bpe:260", "--layers", 3, "--dim", 16),
        *("--heads", 2, "--exits", 1, "--steps", 120, "--seq-len", 16, "--batch-size", 4),
        *("--eval-every", 40, "--checkpoint-every", 10, "--threads", 1),
    ]


def test_a_sharded_run_that_is_stopped_goes_on_alone(offramp, tmp_path, arguments):
    assert offramp(*arguments, "--out", tmp_path / "alone").returncode == 0
    out = tmp_path / "model"
    command = [*TORCHRUN, *map(str, arguments), "--sharding", "fsdp", "--out", str(out)]
    process = subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # to torchrun, which hands it on
    _, stderr = process.communicate(timeout=120)
    assert stderr.count("Checkpoint saved at step") == 1, stderr
    assert stderr.count("validation PPL by layer") >= 1
    assert (out / "unfinished.json").exists()

    result = offramp("train", "--resume", out, "--threads", 1)
    assert result.returncode == 0, result.stderr
    for folder in ("", "last"):
        expected = load_checkpoint(tmp_path / "alone" / folder)[0].state_dict()
        found = load_checkpoint(out / folder)[0].state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=2e-3)
    events = EventAccumulator(str(out / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert set(range(10, 121, 10)) <= set(steps)
    assert steps == sorted(set(steps))
    assert [event.step for event in events.Scalars("validation/ppl_3")] == [40, 80, 120]


def test_a_mistake_is_said_once_and_writes_nothing(tmp_path, arguments):
    out = tmp_path / "model"
    command = [*TORCHRUN, *map(str, arguments), "--accumulate", "4", "--out", str(out)]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("offramp")]
    [sentence] = [line for line in said if "expected" in line]
    assert sentence.endswith("expected a multiple of 8 (accumulate 4 x 2 processes), got 4")
    assert not out.exists()
