"""Values that no program expects, one by one: each is a sentence that names it.

Numbers with 5,000 digits, numbers outside 64 bits, names that no file system takes, a folder that
holds only an adapter, and an output that cannot be written.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest

from offramp.cli.app import COMMANDS, app

WHOLE = ("1" + "0" * 30, "9223372036854775808", "-9223372036854775808", "1.0", "1_")
NUMBERS = ("1" * 5_000, "-" + "9" * 5_000, "1e400", "-1e400", "nan", "inf", "٣", "0x10", "", " ")


def numeric_flags():
    for command in COMMANDS:
        for argument in app[command].assemble_argument_collection():
            words = re.sub(r"Literal\[[^\]]*\]|[A-Z]\w*", "", str(argument.hint))
            if ("int" in words or "float" in words) and argument.names[0].startswith("--"):
                yield command, argument.names[0], "int" in words


@pytest.mark.parametrize(("command", "flag", "whole"), list(numeric_flags()))
def test_a_number_that_is_none_is_refused_for_every_flag(offramp, tmp_path, command, flag, whole):
    for number in NUMBERS + (WHOLE if whole else ()):
        arguments = ["--out", tmp_path / "out"] if command not in ("bench", "generate") else []
        result = offramp(command, tmp_path, *arguments, f"{flag}={number}")
        assert result.returncode == 2, (flag, number)
        assert result.stderr.startswith("offramp: "), result.stderr
        assert result.stderr.count("\n") == 1
        assert len(result.stderr) < 1000, f"{flag}: a sentence of {len(result.stderr)} characters"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threads", ["9223372036854775808", "2147483647", "1025", "0", "-1"])
def test_more_threads_than_a_machine_can_start_are_refused(offramp, world, threads):
    result = offramp(
        "sweep", world / "native", "--corpus", world / "small.txt", "--threads", threads
    )
    assert result.returncode == 2
    assert result.stderr == f"offramp: threads: expected from 1 to 1024, got {threads}\n"


@pytest.mark.parametrize("name", ["x" * 5_000, "a\0b", "", "/".join("x" * 200 for _ in range(30))])
def test_names_that_no_file_can_have(offramp, world, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    native, text = world / "native", world / "small.txt"
    for arguments in (
        ("sweep", name, "--corpus", text),
        ("sweep", native, "--corpus", name),
        ("sweep", native, "--corpus", text, "--out", name),
        ("sweep", native, "--corpus", text, "--certificate", name),
        ("calibrate", native, "--corpus", text, "--check", name),
        ("generate", name, "x"),
        ("plot", name),
        ("export", name, "--exit", "1", "--out", "out"),
        ("tune", native, "--corpus", text, "--out", name),
        ("train", "--corpus", text, "--out", name),
        ("train", "--corpus", text, "--out", "out", "--config", name),
        ("train", "--corpus", text, "--out", "out", "--tokenizer", name),
        ("train", "--resume", name),
    ):
        if name == "" and arguments[-2] == "--out":
            continue  # this folder
        result = offramp(*arguments)
        assert result.returncode == 2, arguments[0]
        assert result.stderr.splitlines()[-1].startswith("offramp: "), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_only_an_adapter_is_named(offramp, world, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for arguments in (
        ("sweep", tmp_path, "--corpus", world / "small.txt"),
        ("generate", tmp_path, "x"),
    ):
        result = offramp(*arguments)
        assert result.returncode == 2
        assert "expected a whole model, got an adapter of the peft library" in result.stderr


def test_an_adapter_beside_a_whole_model_is_not_ignored(offramp, world, tmp_path):
    model = shutil.copytree(world / "checkpoint", tmp_path / "model")
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    result = offramp("sweep", model, "--corpus", world / "small.txt")
    assert result.returncode == 2
    assert "got an adapter of the peft library" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["sweep", "--help"], ["help", "train"], ["generate"]]
)
def test_a_full_disk_as_standard_output_is_a_sentence(world, arguments):
    if arguments == ["generate"]:
        arguments = ["generate", str(world / "native"), "7", "--max-new-tokens", "2", "--json"]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        result = subprocess.run(
            [sys.executable, "-m", "offramp", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr == (
        "offramp: standard output: cannot be written: No space left on device\n"
    )
