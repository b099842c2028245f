"""Every command with hostile flags: one sentence or a result, never a traceback or a hang.

``FUZZ`` is the number of examples of all fuzzers together (``make fuzz``).
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.cli.app import COMMANDS, app
from offramp.errors import ConfigError

EXAMPLES = int(os.environ.get("FUZZ", "1000"))
WORDS = (
    *("", " ", "0", "1", "2", "3", "-1", "-0", "1.5", "0.5", ".5", "1e3x", "1e-9", "1e400"),
    *("nan", "inf", "-inf", "NaN", "infinity", "0x10", "1_0", "+2", "٣", "²", "Ⅷ", "1,2", ","),
    *("1,,2", "1:2", ":", "0.5:0.5", "0.9:", "=", "1=0.3", "1=nan,2=inf", "uniform", "true"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "1" + "0" * 30),
    *("1" * 5_000, "-" + "9" * 5_000, "1." + "0" * 5_000, "x" * 5_000, "é" * 300, "-1e400"),
    *("a\0b", "\0", "\x1b]0;title\x07", "\x1b[2J", "\n", "a\nb", "\ud800", "\u202e", "--", "-"),
    *(".", "..", "/", "/dev/null", "/dev/full", "/dev/zero", "/proc/self/mem", "~", "~nobody"),
    *("*", "cpu", "cuda", "cuda:99", "mps", "meta", "cpu:1", "float16", "bfloat16", "float64"),
    *("gate", "entropy", "patience", "margin", "saturation", "asymmetric:0.5", "asymmetric:nan"),
    *("asymmetric:", "recommended", "deep_supervision", "bytes", "bpe:300", "bpe:0", "max_prob"),
    *("bpe:" + "9" * 5_000, "characters", "pangram", "hf:", "hf:../x", "shared", "norm", "None"),
)  # fmt: skip
LARGE = tuple(word for word in WORDS if word.isascii() and word.isdigit() and len(word) == 19)
SHORT = ("--max-new-tokens", 2, "--repeats", 1)
SMALL = ("--layers", 2, "--dim", 8, "--heads", 2, "--seq-len", 8, "--tracker", "none")
TUNED = ("--seq-len", 16, "--epochs", 1)
LENGTHS = ("--steps", "--epochs", "--tokens", "--max-new-tokens", "--repeats", "--prompts")
"""Flags that may be large, so that a command takes as long as it is told to."""
UNTRIED = ("--ray", "--compile")
"""Flags that wait for another machine, or for a compiler."""
STUDIES = ("study", "recipe", "reproduce")
"""Commands that train many models and keep what they did, whatever happens later."""


def flags_of(command: str) -> list[str]:
    """The flags of a command, and those that all commands have."""
    arguments = app[command].assemble_argument_collection()
    names = {name for argument in arguments for name in argument.names if name.startswith("--")}
    return sorted(names - {*UNTRIED} | {"--help", "--no-such-flag"})


def valid(command: str, world: Path, out: Path) -> list[Any]:
    """A command line that works and takes a moment."""
    native, tuned, text = world / "native", world / "tuned", world / "small.txt"
    small = ("--steps", 1, "--batch-size", 2)
    new = ("--out", out / "out")
    lines: dict[str, tuple[Any, ...]] = {
        "bench": (native, "--corpus", text, *["--prompts", "1", "--prompt-tokens", "4"], *SHORT),
        "calibrate": (native, "--corpus", text, "--out", out / "out.json"),
        "card": (native, "--name", "owner/name", "--out", out / "out.json"),
        "chat": (native, "--plain", "--max-new-tokens", 2),
        "confidence": (native, "--corpus", text, "--out", out / "out.json"),
        "evaluate": (native, "--tasks", world / "task.yaml", "--out", out / "out.json"),
        "export": (native, "--exit", 1, *new),
        "generate": (native, "7 quick", "--max-new-tokens", 2),
        "plot": (world / "sweep.json", "--out", out / "out.png"),
        "probe": (tuned, "--corpus", text, "--out", out / "out.json"),
        "push": (native, "owner/name", "--license", "mit"),
        "quantise": (native, "--weights", "int8", *new),
        "recipe": ("--corpus", text, *new),
        "reproduce": ("--corpus", text, *new),
        "serve": (native, "--port", 0, "--capacity", 16),
        "specialise": (native, "--corpus", world / "text.txt", "--tokens", 64, *small, *new),
        "study": ("alpha", "--corpus", text, *new),
        "sweep": (native, "--corpus", text, "--out", out / "out.json"),
        "train": ("--corpus", text, *small, *SMALL, *new),
        "tune": (world / "checkpoint", "--corpus", text, "--exits", 1, *TUNED, *new),
    }
    return list(lines[command])


def attack(
    command: str, changes: list[tuple[str, int, str]], world: Path, in_order: Callable[..., Any]
) -> None:
    """Run a valid command line with some of its words changed, dropped, doubled or added."""
    flags = flags_of(command)
    with TemporaryDirectory() as aside:
        out = Path(aside)
        line = [str(word) for word in valid(command, world, out)]
        for what, place, word in changes:
            spot = place % len(line) if line else 0
            if what == "flag":
                flag = flags[place % len(flags)]
                word = "3" if flag in LENGTHS and word in LARGE else word
                line += [f"{flag}={word}"] if place % 2 else [flag, word]
            elif what == "bare":
                line.append(flags[place % len(flags)])
            elif what == "insert":
                line.insert(spot, word)
            elif line and what == "word":
                line[spot] = word
            elif line:
                del line[spot]
        written = [out / name for name in ("out.json", "out.png", "out") if str(out / name) in line]
        checked = written and command not in STUDIES
        in_order(command, *line, out=written[0] if checked else None)


CHANGE = st.tuples(
    st.sampled_from(("flag", "flag", "flag", "bare", "word", "insert", "drop")),
    st.integers(0, 999),
    st.sampled_from(WORDS),
)


@pytest.fixture
def no_work(monkeypatch):
    """Commands that train many models stop before the first, and the server before it serves."""

    def stop(*arguments: object, **named: object) -> None:
        raise ConfigError("enough")

    monkeypatch.setattr("offramp.studies.study.workers.Workers.do", stop)
    monkeypatch.setattr("offramp.studies.study.study.keep_static_times", stop)
    monkeypatch.setattr("offramp.studies.reproduce.study.run_all", stop)
    monkeypatch.setattr("offramp.serving.server.run", stop)


@pytest.fixture(autouse=True)
def away_from_the_hub(monkeypatch):
    """Nothing is pushed to the real hub, and nothing is looked up there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("command", COMMANDS)
def test_hostile_flags_are_a_sentence_or_do_no_harm(
    command, world, in_order, monkeypatch, tmp_path, no_work
):
    monkeypatch.chdir(tmp_path)

    @settings(max_examples=max(3, round(0.25 * EXAMPLES / len(COMMANDS))))
    @given(changes=st.lists(CHANGE, min_size=1, max_size=3))
    def check(changes):
        monkeypatch.setattr("sys.stdin", io.StringIO("7 quick\n/threshold 0.5\nfoxes\n"))
        attack(command, changes, world, in_order)

    check()
