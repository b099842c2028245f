"""What the tests of the command line share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def trained(offramp: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that ``offramp train`` wrote: 4 layers, exits at 1 and 2."""
    out = tmp_path_factory.mktemp("trained") / "model"
    result = offramp(
        *("train", "--corpus", "pangram", "--layers", 4, "--dim", 16, "--heads", 2),
        *("--exits", "1,2", "--loss-weights", "1=0.3,2=0,4=0.7", "--steps", 30),
        *("--seq-len", 32, "--batch-size", 8, "--lr", "3e-3", "--seed", 1, "--out", out),
    )
    assert result.returncode == 0, result.stderr
    return out
