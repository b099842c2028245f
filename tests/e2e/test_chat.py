"""offramp chat, as lines of a script and as a person types it."""

import io
import json
import os
import pty
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import offramp as library

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}. {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
NEW = 6
FLAGS = ("--max-new-tokens", NEW)


def with_template(checkpoint: Path, folder: Path, template: str) -> Path:
    shutil.copytree(checkpoint, folder)
    about = {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def talker(checkpoint, tmp_path_factory):
    """A random Llama of 64 positions, with a chat template of its characters."""
    return with_template(checkpoint, tmp_path_factory.mktemp("talker") / "model", TEMPLATE)


@pytest.fixture(scope="module")
def lm(talker):
    return library.load(talker)


@pytest.fixture
def piped(offramp, talker, monkeypatch):
    """Run the command with lines on standard input."""

    def run(lines, *flags, model=talker):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return offramp("chat", model, *FLAGS, *flags)

    return run


@pytest.fixture
def typed(offramp, talker, monkeypatch):
    """Run the command with keys that a person presses."""
    toolkit = pytest.importorskip("prompt_toolkit")
    session = pytest.importorskip("prompt_toolkit.application").create_app_session
    output = pytest.importorskip("prompt_toolkit.output").DummyOutput()
    assert toolkit
    monkeypatch.setattr("offramp.cli.chat.in_a_terminal", lambda: True)

    def run(keys, *flags):
        with toolkit.input.create_pipe_input() as keyboard, session(keyboard, output):
            keyboard.send_text(keys)
            return offramp("chat", talker, *FLAGS, *flags)

    return run


def answers(lm, *messages, **options):
    """The answers to messages: each continues the text of the conversation so far."""
    text, given = "", []
    for message in messages:
        text += f"u {message}. a "
        given.append(lm.generate(text, max_new_tokens=NEW, **options).text)
        text += f"{given[-1]}. "
    return given


def test_each_line_is_a_message_of_one_conversation(piped, lm):
    result = piped("7 quick\n\nfoxes\r\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == answers(lm, "7 quick", "foxes")
    assert result.stderr.count("mean layers 4.0 of 4") == 2


def test_a_system_message_begins_it_again_after_a_reset(piped, lm):
    result = piped("7 quick\n/reset\n7 quick\n", "--system", "dogs")
    first, second = result.stdout.splitlines()
    assert first == second == lm.generate("s dogs. u 7 quick. a ", max_new_tokens=NEW).text


def test_commands_choose_where_tokens_leave(piped, lm):
    result = piped("/threshold 0\n7 quick\n/full\nfoxes\n/threshold\n/quit\nno answer\n")
    assert result.returncode == 0, result.stderr
    early = lm.generate("u 7 quick. a ", max_new_tokens=NEW, threshold=0.0)
    (one, two), said = result.stdout.splitlines(), result.stderr
    assert one == early.text
    assert two == lm.generate(f"u 7 quick. a {one}. u foxes. a ", max_new_tokens=NEW).text
    assert f"mean layers {early.mean_layers:.1f} of 4" in said
    assert "Tokens leave at threshold 0.0." in said
    assert "its exits were never trained" in said
    assert "Exits are decided by max_prob" in said
    assert said.count("Every token runs through all layers.") == 2


def test_flags_are_those_of_generate(piped, lm):
    drawn = answers(lm, "7 quick", "foxes", temperature=1.5, seed=3)
    result = piped("7 quick\nfoxes\n", "--temperature", 1.5, "--seed", 3)
    assert result.stdout.splitlines() == drawn
    speculative = piped("7 quick\n/speculative\nfoxes\n")
    assert speculative.stdout.splitlines() == answers(lm, "7 quick", "foxes")


@pytest.mark.parametrize(
    ("lines", "flags", "said"),
    [
        ("/threshhold 1\n", (), "command: expected one of /threshold, /full"),
        ("/threshold high\n", (), "threshold: expected a number"),
        ("/threshold nan\n", (), "threshold"),
        ("/threshold 1:1:1:1:1:1\n", (), "thresholds: expected 3"),
        ("x" * (1 << 20) + "\n", (), "prompt: expected lines of fewer than 1,048,576 bytes"),
        ("7\n", ("--threshold", "1:1:1:1:1:1"), "thresholds: expected 3"),
        ("7\n", ("--confidence", "gate", "--threshold", 1), "gate"),
        ("7\n", ("--plain", "--system", "dogs"), "system: expected none with plain"),
    ],
)
def test_a_mistake_ends_a_script_with_one_sentence(piped, lines, flags, said):
    result = piped(f"{lines}7\n", *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("offramp: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_standard_input_that_is_not_utf8_is_one_sentence(offramp, talker, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(b"7\ncaf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stream)
    result = offramp("chat", talker, *FLAGS)
    assert result.returncode == 2
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr.endswith(
        "offramp: prompt: expected UTF-8 on standard input, got unexpected end of data\n"
    ) or result.stderr.endswith("got invalid continuation byte\n")


def test_a_model_without_a_template_says_so_before_any_line(piped, checkpoint):
    result = piped("7 quick\n", model=checkpoint)
    assert (result.returncode, result.stdout) == (2, "")
    assert "chat: expected a model with a chat template" in result.stderr


@pytest.mark.parametrize("template", ["{{ raise_exception('no such role') }}", "{% for %}"])
def test_a_template_that_fails_is_one_sentence(piped, checkpoint, tmp_path, template):
    result = piped("7\n", model=with_template(checkpoint, tmp_path / "model", template))
    assert (result.returncode, result.stdout) == (2, "")
    assert "chat: expected a chat template that takes these messages, got: " in result.stderr
    assert result.stderr.count("\n") == 1


def test_plain_continues_one_text(piped, checkpoint):
    result = piped("7 quick\n foxes\n", "--plain", model=checkpoint)
    assert result.returncode == 0, result.stderr
    one, two = result.stdout.splitlines()
    lm = library.load(checkpoint)
    assert one == lm.generate("7 quick", max_new_tokens=NEW).text
    assert two == lm.generate(f"7 quick{one} foxes", max_new_tokens=NEW).text


def test_a_conversation_that_outgrows_the_model_is_told(piped, typed, lm):
    """The model has 64 positions: three turns of ``7 quick`` need 22 + 2 * 21 + 6."""
    turn = "7 quick\n"
    result = piped(turn * 9)
    assert result.returncode == 2
    assert "conversation: expected at most 64 tokens" in result.stderr
    assert "/reset" in result.stderr
    one, *rest = piped(turn * 9, "--max-new-tokens", 60).stderr.splitlines()
    assert "tokens/s" in one
    assert "cut, because the conversation has 64 tokens" in rest[0]
    result = typed(turn.replace("\n", "\r") * 9 + "/reset\r7 quick\r/quit\r")
    assert result.returncode == 0, result.stderr
    assert "conversation: expected at most 64 tokens" in result.stderr
    shown = result.stdout.splitlines()
    assert shown[0] == shown[-1]


def test_a_person_types_commands_and_brings_a_line_back(typed, lm):
    up = "\x1b[A"
    result = typed(f"7 quick\r/nonsense\r/help\r/reset\r{up}{up}{up}{up}\r\x04")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == 2 * answers(lm, "7 quick")
    assert "command: expected one of /threshold, /full" in result.stderr
    assert "got '/nonsense'" in result.stderr
    assert "/speculative" in result.stderr
    assert "4 layers, exits: 1, 2, 3." in result.stderr


def test_alt_enter_begins_a_line_and_a_space_hides_a_command(typed, lm):
    result = typed("7 quick\x1b\r foxes\r\x04")
    assert result.stdout.splitlines()
    assert result.stderr.count("tokens/s") == 1
    result = typed(" /quit\r\x04")
    assert result.stderr.count("tokens/s") == 1


def test_ctrl_c_clears_a_line_or_stops_an_answer_and_keeps_the_conversation(typed, lm, monkeypatch):
    from offramp.cli.decoding import show_tokens

    def stopping(shown, opened):
        show, count = show_tokens(shown, opened), iter(range(100))

        def third(text, exit_layer):
            show(text, exit_layer)
            if next(count) == 2 and not stopped:
                stopped.append(True)
                signal.raise_signal(signal.SIGINT)

        return third

    stopped = []
    monkeypatch.setattr("offramp.cli.chat.show_tokens", stopping)
    result = typed("lazy\x037 quick\rfoxes\r\x03\x04")
    assert result.returncode == 0, result.stderr
    whole = answers(lm, "7 quick")[0]
    one, two = result.stdout.splitlines()
    assert one == whole[:3]
    assert two == lm.generate(f"u 7 quick. a {one}. u foxes. a ", max_new_tokens=NEW).text
    assert "Stopped; the conversation keeps the answer so far." in result.stderr
    assert result.stderr.count("Ctrl-D or /quit ends the chat.") == 2


def test_ctrl_c_ends_a_script(piped, monkeypatch):
    def stop(*arguments):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("offramp.cli.chat.show_tokens", lambda *_: stop)
    result = piped("7 quick\nfoxes\n")
    assert result.returncode == 130
    assert result.stderr.endswith("offramp: interrupted\n")


def test_without_prompt_toolkit_lines_still_work(offramp, piped, talker, monkeypatch):
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    assert piped("7 quick\n").returncode == 0
    monkeypatch.setattr("offramp.cli.chat.in_a_terminal", lambda: True)
    result = offramp("chat", talker)
    assert result.returncode == 2
    assert result.stderr == (
        "offramp: chat: expected the library prompt_toolkit, which is not installed; "
        "pip install 'offramp[chat]'\n"
    )


def test_in_a_real_terminal(talker):
    """Keys, colours, Ctrl-C at the prompt and Ctrl-D, in a pseudo-terminal."""
    pytest.importorskip("prompt_toolkit")
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="80", LINES="24")
        command = [sys.executable, "-m", "offramp", "chat", str(talker), "--threshold", "0"]
        os.execv(sys.executable, [*command, "--max-new-tokens", str(NEW), "--threads", "1"])
    seen = b""

    def until(*expected: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while not all(each in seen for each in expected):
            assert time.monotonic() < deadline, seen
            try:
                seen += os.read(terminal, 4096)
            except OSError:
                break
        assert all(each in seen for each in expected), seen
        seen = b""

    until(b"ends the chat.", b"> ")
    os.write(terminal, b"7 quick\r")
    until(b"\x1b[38;5;", b"exit layer: ", b"mean layers", b"> ")
    os.write(terminal, b"\x03")
    until(b"Ctrl-D or /quit", b"> ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
