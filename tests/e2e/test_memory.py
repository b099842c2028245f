"""Memory that runs out is one sentence and exit code 2, whoever notices it first."""

import errno
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

from offramp import cli
from offramp.cli.memory import memory_sentence

ERRORS = [
    MemoryError(),
    MemoryError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_every_error_of_too_little_memory_is_a_sentence(error, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("cyclopts.App.__call__", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sweep"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("offramp: memory: expected enough for this command")
    assert said.count("\n") == 1


def test_libraries_raise_errors_that_are_recognised():
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(1 << 60, np.uint8)
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 60, dtype=torch.uint8)
    for found in (of_numpy, of_torch):
        assert memory_sentence(found.value)


def test_other_errors_are_none_of_memory():
    for error in (OSError(errno.ENOENT, "out of memory"), RuntimeError("shape"), ValueError()):
        assert memory_sentence(error) is None


@pytest.mark.parametrize("megabytes", [200, 600])
def test_a_limit_on_memory_is_a_sentence(tmp_path, megabytes):
    """The limit is that of ``ulimit -v``; the process ends while it imports its libraries."""
    limit = megabytes << 20
    result = subprocess.run(
        [sys.executable, "-m", "offramp", "train", "--corpus", "pangram", "--out", tmp_path / "a"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("offramp: memory: expected enough for this command")
    assert not (tmp_path / "a").exists()
