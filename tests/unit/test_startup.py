"""What needs no model answers without importing PyTorch; Ctrl-C during the start is one line."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

import offramp
from offramp.cli.app import COMMANDS

HEAVY = ("torch", "numpy", "scipy", "transformers", "jinja2", "altair", "tokenizers")
RUN = f"""
import contextlib, io, json, sys
from pathlib import Path
from offramp.cli import main
answers = []
for line in json.load(sys.stdin):
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main(line)
        except SystemExit as stop:
            code = stop.code
    heavy = [name for name in {HEAVY} if name in sys.modules]
    left = [path.name for path in Path.cwd().iterdir()]
    answers.append([code, stdout.getvalue(), stderr.getvalue(), heavy, left])
json.dump(answers, sys.stdout)
"""
REQUIRED = {  # what makes a command line whole, so that only the bad value is wrong
    "bench": ["MODEL"],
    "calibrate": ["MODEL", "--corpus", "TEXT"],
    "card": ["MODEL"],
    "chat": ["MODEL"],
    "confidence": ["MODEL", "--corpus", "TEXT"],
    "evaluate": ["MODEL", "--tasks", "TASK"],
    "export": ["MODEL", "--out", "OUT"],
    "generate": ["MODEL", "PROMPT"],
    "plot": ["FILE"],
    "probe": ["MODEL", "--corpus", "TEXT"],
    "push": ["MODEL", "OWNER/NAME"],
    "quantise": ["MODEL", "--weights", "int8", "--out", "OUT"],
    "recipe": ["--corpus", "TEXT", "--out", "OUT"],
    "reproduce": [],
    "serve": ["MODEL"],
    "specialise": ["MODEL", "--corpus", "TEXT", "--out", "OUT"],
    "study": ["alpha", "--corpus", "TEXT", "--out", "OUT"],
    "sweep": ["MODEL", "--corpus", "TEXT"],
    "train": ["--corpus", "TEXT", "--out", "OUT"],
    "tune": ["MODEL", "--corpus", "TEXT", "--out", "OUT"],
}
BAD_VALUES = {  # the second is refused by a config, where the command has one
    "bench": [
        *(("--prompts", "x"), ("--prompts", "0"), ("--confidence", "surety")),
        ("--weights", "int3"),
    ],
    "calibrate": [("--epsilon", "x"), ("--epsilon", "2"), ("--delta", "0"), ("--weights", "int3")],
    "card": [("--name", "a b"), ("--license", "")],
    "chat": [
        *(("--seed", "x"), ("--temperature", "-1"), ("--threshold", "high")),
        *(("--top-k", "x"), ("--weights", "int3")),
    ],
    "confidence": [("--dtype", "int3"), ("--weights", "int3")],
    "evaluate": [
        *(("--limit", "x"), ("--limit", "0"), ("--threshold", "high"), ("--weights", "int3")),
    ],
    "export": [("--exit", "x")],
    "generate": [
        *(("--seed", "x"), ("--temperature", "-1"), ("--threshold", "high")),
        ("--weights", "int3"),
    ],
    "plot": [("--out", "x.bmp")],
    "probe": [("--tokens", "x"), ("--weights", "int3")],
    "push": [("--license", ""), ("--message", "")],
    "quantise": [("--weights", "int3"), ("--threads", "x")],
    "recipe": [("--layers", "x"), ("--layers", "1"), ("--jobs", "0")],
    "reproduce": [
        *(("--seeds", "x"), ("--seeds", "0"), ("--jobs", "0"), ("--alphas", "0.1,2")),
        *(("--alphas", "0.1,x"), ("--thresholds", "nan")),
    ],
    "serve": [
        *(("--port", "x"), ("--port", "65536"), ("--slots", "0"), ("--host", "nowhere.invalid")),
        *(("--weights", "int3"), ("--cors", "example.org"), ("--grace", "nan")),
    ],
    "specialise": [("--steps", "x"), ("--steps", "0")],
    "study": [
        *(("--seeds", "x"), ("--seeds", "0"), ("--threads", "0"), ("--sizes", "x")),
        ("--sizes", "100"),
    ],
    "sweep": [("--dtype", "int3"), ("--thresholds", "high"), ("--weights", "int3")],
    "train": [("--steps", "x"), ("--steps", "0"), ("--lr", "0")],
    "tune": [("--lr", "x"), ("--lr", "nan"), ("--tokens", "1")],
}


@dataclass(frozen=True)
class Answer:
    code: int
    stdout: str
    stderr: str


Ask = Callable[..., Answer]


def mistyped(word):
    return word[:-2] + word[-1] + word[-2]


NEAR = {
    "export": "--out",
    "card": "--name",
    "plot": "--out",
    "push": "--private",
    "quantise": "--threads",
    "reproduce": "--quick",
    "study": "--tokens",
    "tune": "--tokens",
}
WHOLE = {"export": ["MODEL", "--exit", "1", "--out", "OUT"]}
HELP = [["--help"], ["help"], []]
VERSION = [["--version"], ["-V"]]
PAGES = [[command, "--help"] for command in COMMANDS] + [["help", name] for name in COMMANDS]
TYPOS = [["hepl"], ["trian"], ["--versino"], ["help", "trian"]]
FLAGS = [
    [command, *WHOLE.get(command, REQUIRED[command]), mistyped(NEAR.get(command, "--threads")), "1"]
    for command in COMMANDS
]
MISSING = [[command] for command in COMMANDS if REQUIRED[command]]
BAD = [
    [command, *REQUIRED[command], flag, value]
    for command, values in BAD_VALUES.items()
    for flag, value in values
]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """What a command line is answered; all are tried in one new process, to spare its start.

    It has imported nothing heavy and written nothing.
    """
    lines = [*HELP, *VERSION, *PAGES, *TYPOS, *FLAGS, *MISSING, *BAD]
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path_factory.mktemp("empty"),
        env={**os.environ, "COLUMNS": "80"},
    )
    answers = dict(zip(map(tuple, lines), json.loads(done.stdout), strict=True))

    def ask(*arguments: str) -> Answer:
        code, stdout, stderr, heavy, left = answers[arguments]
        assert (heavy, left) == ([], [])
        return Answer(code, stdout, stderr)

    return ask


def refused(answer, *expected):
    assert (answer.code, answer.stdout) == (2, "")
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.startswith("offramp: ")
    for part in expected:
        assert part in answer.stderr


def heavy_after(code):
    """What is imported after this code."""
    code = f"import sys\n{code}\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_import_imports_nothing_heavy():
    assert heavy_after("import offramp, offramp.cli; dir(offramp); offramp.OfframpError") == []


def test_a_name_that_needs_pytorch_imports_it():
    assert "torch" in heavy_after("import offramp; offramp.Transformer")


def test_the_command_line_itself_imports_nothing_heavy():
    code = "import offramp.cli; sys.argv = ['offramp', '--version']; offramp.cli.main()"
    assert heavy_after(code) == [offramp.__version__]


@pytest.mark.parametrize("line", VERSION)
def test_version(answer, line):
    assert answer(*line) == Answer(0, f"{offramp.__version__}\n", "")


def test_help_lists_every_command_with_a_sentence(answer):
    page = answer("--help")
    assert answer("help") == answer() == page
    assert (page.code, page.stderr) == (0, "")
    lines = page.stdout.splitlines()
    for command in (*COMMANDS, "help"):
        (described,) = [line for line in lines if line.startswith(f"│ {command} ")]
        assert len(described.split()) > 5, described
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(answer, command):
    page = answer(command, "--help")
    assert (page.code, page.stderr) == (0, "")
    assert f"Usage: offramp {command}" in page.stdout
    assert max(map(len, page.stdout.splitlines())) <= 80
    assert answer("help", command) == page


@pytest.mark.parametrize(
    ("line", "nearest"),
    list(zip(TYPOS, ['"help"', '"train"', "--version", '"train"'], strict=True)),
)
def test_a_mistyped_command_names_the_nearest(answer, line, nearest):
    refused(answer(*line), line[-1], "Did you mean", nearest)


@pytest.mark.parametrize("line", FLAGS, ids=COMMANDS)
def test_a_mistyped_flag_names_the_nearest(answer, line):
    refused(answer(*line), f"{line[-2]}. Did you mean --")


@pytest.mark.parametrize("line", MISSING, ids=lambda line: line[0])
def test_a_missing_argument(answer, line):
    refused(answer(*line))


@pytest.mark.parametrize("line", BAD, ids=lambda line: f"{line[0]}{line[-2]}-{line[-1]}")
def test_a_bad_value(answer, line):
    refused(answer(*line), line[-2].removeprefix("--"))


def test_every_command_is_tried_with_bad_values():
    assert set(BAD_VALUES) == set(REQUIRED) == set(COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_and_knows_every_command(shell, tmp_path):
    script = tmp_path / "script"
    line = ["offramp", "--install-completion", "--shell", shell, "--output", str(script)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        assert "torch" not in heavy_after(
            f"import offramp.cli; sys.argv = {line}; offramp.cli.main()"
        )
    text = script.read_text(encoding="utf-8")
    for command in (*COMMANDS, "help"):
        assert command in text
    assert "--checkpoint-every" in text


SCRIPT = "import sys; from offramp.cli import main; sys.exit(main())"  # as an installer writes it
ENTRIES = {"script": ["-c", SCRIPT], "module": ["-m", "offramp"]}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "moment", ["cyclopts.core", "offramp.cli.app", "numpy", "torch._C", "torch.nn.functional"]
)
def test_ctrl_c_during_the_start_is_one_line(entry, moment, tmp_path):
    """The moment is when a module has been imported, which the interpreter reports."""
    command = [sys.executable, "-X", "importtime", *ENTRIES[entry], "bench", "nowhere"]
    seen, lines = False, []
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if not line.startswith("import time:"):
                lines.append(line)
            elif not seen and line.split("|")[-1].strip() == moment:
                process.send_signal(signal.SIGINT)
                seen = True
    assert seen
    assert lines == ["offramp: interrupted\n"]
    assert process.returncode == 130
