"""Every command looks its model up once, and opens it once."""

import shutil

import pytest

from offramp.models import model_files, sources
from offramp.models.huggingface import exits_file, places


@pytest.fixture
def lookups(monkeypatch):
    """The names that a checkpoint was looked up by, in order."""
    found = []
    find = sources.find_checkpoint

    def counted(name):
        if not isinstance(name, sources.Source):
            found.append(str(name))
        return find(name)

    from offramp.models.native import llama

    for module in (sources, model_files, exits_file, places, llama):
        monkeypatch.setattr(module, "find_checkpoint", counted)
    return found


@pytest.fixture(scope="module")
def tuned(offramp, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "tuned"
    result = offramp(
        *("tune", checkpoint, "--corpus", checkpoint / "text.txt", "--exits", "1,2"),
        *("--seq-len", 32, "--epochs", 1, "--out", out),
    )
    assert result.returncode == 0, result.stderr
    return out


COMMANDS = {
    "sweep": ("--corpus", "TEXT"),
    "probe": ("--corpus", "TEXT", "--tokens", 300),
    "confidence": ("--corpus", "TEXT", "--fit", "TEXT"),
    "calibrate": ("--corpus", "TEXT"),
    "generate": ("7 quick brown", "--max-new-tokens", 3, "--threshold", 0.1),
    "bench": (
        *("--corpus", "TEXT", "--prompts", 1, "--repeats", 1, "--prompt-tokens", 8),
        *("--max-new-tokens", 4, "--no-peers"),
    ),
    "export": ("--exit", 4, "--out", "OUT"),
    "specialise": (
        *("--corpus", "TEXT", "--steps", 1, "--tokens", 500, "--compute-budget", 99),
        *("--out", "OUT"),
    ),
    "tune": ("--corpus", "TEXT", "--exits", 1, "--seq-len", 32, "--epochs", 1, "--out", "OUT"),
}


@pytest.mark.parametrize("kind", ["native", "checkpoint", "tuned"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_looks_its_model_up_once(
    offramp, trained, checkpoint, tuned, tmp_path, lookups, command, kind
):
    if command == "tune" and kind != "checkpoint":
        pytest.skip("tune takes plain checkpoints")
    if command == "specialise" and kind == "checkpoint":
        pytest.skip("specialise takes trained exits")
    model = {"native": trained, "checkpoint": checkpoint, "tuned": tuned}[kind]
    words = {"TEXT": checkpoint / "text.txt", "OUT": tmp_path / "out"}
    if command == "confidence":  # it writes beside the weights
        shutil.copytree(model, tmp_path / "copy")
        model = tmp_path / "copy"
    arguments = [words.get(word, word) for word in COMMANDS[command]]
    result = offramp(command, model, *arguments)
    assert result.returncode == 0, result.stderr
    assert len(lookups) == 1
