"""What generate prints is the text; a terminal is shown control characters; no locale breaks it."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from offramp.errors import ConfigError, CorpusError
from offramp.lm import load
from offramp.printable import printable

WILD = "\x1b]0;title\x07\t\f\u202e \n\u00ef\U0001f44d"


@pytest.fixture(scope="module")
def wild(offramp, tmp_path_factory):
    """A model that knows hardly anything but control characters."""
    folder = tmp_path_factory.mktemp("wild")
    (folder / "text.txt").write_text(WILD * 300)
    shape = ("--layers", 2, "--dim", 8, "--heads", 2, "--exits", 1, "--seq-len", 8)
    result = offramp(
        *("train", "--corpus", folder / "text.txt", *shape, "--steps", 4, "--batch-size", 4),
        *("--tracker", "none", "--out", folder / "model"),
    )
    assert result.returncode == 0, result.stderr
    return folder / "model"


FLAGS = ("--max-new-tokens", 60, "--temperature", 2)


def test_printed_text_is_the_text(offramp, wild):
    text = json.loads(offramp("generate", wild, "\t", *FLAGS, "--json").stdout)["text"]
    assert {"\x1b", "\t", "\f", "\u202e"} < set(text)
    assert offramp("generate", wild, "\t", *FLAGS).stdout == f"\t{text}\n"


def test_a_terminal_is_shown_control_characters_and_keeps_tabs_and_lines(
    offramp, wild, monkeypatch
):
    text = json.loads(offramp("generate", wild, "\t", *FLAGS, "--json").stdout)["text"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    for exits in ((), ("--threshold", 0)):
        prompt = "\x1b[2J\t" if exits else "\t"
        seen = offramp("generate", wild, prompt, *FLAGS, *exits).stdout
        assert "\x1b[" in seen  # colours
        plain = re.sub(r"\x1b\[[0-9;]*m", "", seen)
        assert printable(plain, lines=True) == plain
        if exits:
            assert plain.startswith("\\x1b[2J\t")
        else:
            assert plain == f"\t{printable(text, lines=True)}\n"


def run(*arguments, env=None, stdin=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "offramp", *map(os.fsencode, map(str, arguments))],
        input=stdin,
        capture_output=True,
        check=False,
        env={**os.environ, **(env or {})},
        **options,
    )


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
    ],
    ids=["ascii", "C", "latin-1"],
)
def test_a_character_that_the_output_cannot_express_is_an_escape(wild, env):
    """The prompt is read as UTF-8 in any locale."""
    done = run("generate", wild, "\u00ef\U0001f44d", *FLAGS, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith((rb"\xef\U0001f44d", b"\xef\\U0001f44d"))
    assert b"Traceback" not in done.stderr


def test_arguments_and_prompts_that_are_not_utf8_are_one_sentence(offramp, wild, monkeypatch):
    bad = os.fsdecode(b"caf\xe9")
    for arguments in (
        ("generate", wild, bad),
        ("generate", wild, "\t", "--stop", bad),
        ("sweep", wild, "--corpus", bad),
        ("sweep", bad, "--corpus", "pangram"),
    ):
        result = offramp(*arguments)
        assert result.returncode == 2
        assert result.stderr == "offramp: expected arguments in UTF-8, got 'caf\\udce9'\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    result = offramp("generate", wild, "-")
    assert result.returncode == 2
    assert result.stderr.startswith("offramp: prompt: expected UTF-8 on standard input, got")
    with pytest.raises((ConfigError, CorpusError), match=r"^[^\n]*expected[^\n]*$"):
        load(wild).generate("caf\udce9")


def test_a_pipe_that_ends_early_ends_the_command_silently(wild):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        arguments = [sys.executable, "-m", "offramp", "generate", wild, "\t"]
        done = subprocess.run(arguments, stdout=closed, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 141
    assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_on_a_full_disk_is_one_sentence(wild):
    with Path("/dev/full").open("wb") as full:
        arguments = [sys.executable, "-m", "offramp", "generate", wild, "\t"]
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"offramp: standard output: cannot be written: ")
    assert done.stderr.count(b"\n") == 1


def test_names_in_messages_are_shown_not_obeyed(offramp, wild, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    hostile = tmp_path / "a\x1b]0;title\x07\u202e"
    assert (
        r"a\x1b]0;title\x07\u202e: expected" in offramp("sweep", wild, "--corpus", hostile).stderr
    )
    hostile.write_text(WILD * 20)
    result = offramp("probe", wild, "--corpus", hostile)
    assert result.returncode == 0, result.stderr
    assert r"\x1b]0;title" in result.stdout
    for text in (result.stdout, result.stderr):
        assert printable(text, lines=True) == text
