"""The command line, run as a user runs it (in this process, to spare the start of torch)."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from offramp import cli
from offramp.cli.base import console


@dataclass(frozen=True)
class Outcome:
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


@pytest.fixture(scope="session")
def offramp() -> Command:
    def run(*arguments: object) -> Outcome:
        stdout, stderr = io.StringIO(), io.StringIO()
        code = 0
        console.file = stderr
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                cli.main([str(argument) for argument in arguments])
            except SystemExit as stop:
                code = int(stop.code or 0)
        return Outcome(code, stdout.getvalue(), stderr.getvalue())

    return run


@pytest.fixture(scope="session")
def trained(offramp: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that ``offramp train`` wrote: 4 layers, exits at 1 and 2."""
    out = tmp_path_factory.mktemp("trained") / "model"
    result = offramp(
        *("train", "--corpus", "pangram", "--layers", 4, "--dim", 16, "--heads", 2),
        *("--exits", "1,2", "--loss-weights", "1=0.3,2=0,4=0.7", "--steps", 30),
        *("--seq-len", 32, "--batch-size", 8, "--lr", "3e-3", "--seed", 1, "--out", out),
    )
    assert result.returncode == 0, result.stderr
    return out
