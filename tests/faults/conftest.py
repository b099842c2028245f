"""What the fuzzers share: files of every kind, and a command that must end in order."""

import faulthandler
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from safetensors.torch import load_file, save_file

SECONDS = 10
"""A command that takes longer hangs."""

hypothesis.settings.register_profile(
    "faults",
    deadline=None,
    derandomize="CI" in os.environ,  # else other examples each time; one that fails is printed
    print_blob=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture(autouse=True, scope="session")
def _many_examples() -> None:
    hypothesis.settings.load_profile("faults")


class Hang(BaseException):
    """A command took too long."""


@contextmanager
def at_most(seconds: int = SECONDS) -> Iterator[None]:
    """Raise Hang after so many seconds; what cannot be interrupted ends the process later."""

    def ring(number: int, frame: Any) -> None:
        raise Hang(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(6 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def world(
    offramp: Callable[..., Any], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a file of every kind that a command reads; the models are tiny."""
    folder = tmp_path_factory.mktemp("world")
    text, small = folder / "text.txt", folder / "small.txt"
    shutil.copy(checkpoint / "text.txt", text)
    small.write_text("7 quick brown foxes jump. " * 4)
    shutil.copytree(checkpoint, folder / "checkpoint")
    native, tuned = folder / "native", folder / "tuned"

    def made(*arguments: object) -> None:
        result = offramp(*arguments)
        assert result.returncode == 0, result.stderr

    made(
        *("train", "--corpus", text, "--layers", 2, "--dim", 16, "--heads", 2, "--exits", 1),
        *("--steps", 4, "--seq-len", 16, "--batch-size", 2, "--out", native),
    )
    shutil.copytree(native, folder / "stopped")
    (folder / "stopped" / "run.json").rename(folder / "stopped" / "unfinished.json")
    made(
        *("tune", folder / "checkpoint", "--corpus", text, "--exits", "1,2", "--seq-len", 32),
        *("--exit-head", "norm", "--epochs", 1, "--out", tuned),
    )
    for name, model, scheme in (("int8", native, "int8"), ("int4", tuned, "int4")):
        made("quantise", model, "--weights", scheme, "--out", folder / name)
    made("confidence", tuned, "--corpus", small, "--fit", text, "--out", folder / "confidence.json")
    for name, arguments in {
        "certificate.json": ("calibrate", native, "--corpus", small),
        "budget.json": ("calibrate", native, "--corpus", small, "--compute-budget", 99),
        "sweep.json": ("sweep", native, "--corpus", small),
        "probe.json": ("probe", native, "--corpus", small),
    }.items():
        made(*arguments, "--out", folder / name)
    made(
        *("calibrate", native, "--corpus", small, "--check", folder / "certificate.json"),
        *("--out", folder / "check.json"),
    )
    shutil.copy(native / "metrics.csv", folder)
    (folder / "flags.toml").write_text(
        'exits = [1]\nlr = 1e-3\nnorm = "pre"\nshuffle = true\nwarmup-steps = 1\nseed = 1\n'
    )
    flags = {"exit_layers": [1], "loss-weights": "asymmetric:0.5", "grad-clip": 1.0, "patience": 2}
    (folder / "flags.json").write_text(json.dumps(flags | {"exit_head": "norm", "seed": 1}))
    (folder / "lines.jsonl").write_text('{"text": "7 quick brown"}\n{"text": "foxes jump."}\n' * 4)
    (folder / "task.jsonl").write_text('{"text": "7 quick", "words": [" foxes", " dogs"]}\n' * 2)
    (folder / "task.yaml").write_text(
        "{task: own, dataset_path: json, dataset_kwargs: {data_files: {test: task.jsonl}}, "
        "test_split: test, output_type: multiple_choice, doc_to_text: text, "
        "doc_to_choice: words, doc_to_target: 0}"
    )
    made("evaluate", native, "--tasks", folder / "task.yaml", "--out", folder / "evaluation.json")
    _split(folder / "checkpoint", folder / "split")
    (folder / "checkpoint" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


def _split(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint's weights as two files with an index."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(weights), ("one.safetensors", "two.safetensors")
    where = {name: files[index % 2] for index, name in enumerate(names)}
    for file in files:
        part = {name: weights[name] for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def in_time() -> Callable[..., Any]:
    return at_most


@pytest.fixture(scope="session")
def in_order(offramp: Callable[..., Any]) -> Callable[..., None]:
    """Run a command and check that it ends in order.

    It ends in 10 s with exit code 0 or 2; with 2 its last line is one sentence, and ``out`` is as
    it was before. No temporary file is left beside ``out``.
    """

    def run(*arguments: object, out: Path | None = None) -> Any:
        before = _content(out)
        with at_most():
            result = offramp(*arguments)
        assert result.returncode in (0, 2), result.stderr
        assert "Traceback" not in result.stderr, result.stderr
        if result.returncode == 2:
            *_, last = ["", *result.stderr.splitlines()]
            assert last.startswith("offramp: "), result.stderr
            assert _content(out) == before, "half an output"
        left = [] if out is None else [*out.parent.glob(".*.tmp"), *out.parent.glob("*.tmp")]
        assert not left, f"left behind: {left}"
        return result

    return run


def _content(path: Path | None) -> Any:
    if path is None or not os.path.lexists(path):
        return None
    if path.is_dir():
        return sorted(
            (str(each.relative_to(path)), each.stat().st_size) for each in path.rglob("*")
        )
    return path.read_bytes() if path.is_file() else "other"
