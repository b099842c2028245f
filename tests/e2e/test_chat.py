"""offramp chat, as lines of a script and as a person types it."""

import io
import json
import os
import pty
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import offramp as library
from offramp.commands.chat import Conversation
from offramp.generation.config import GenerateConfig
from offramp.models.open import open_in_memory

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}. {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
NEW = 6
FLAGS = ("--max-new-tokens", NEW)


def with_template(model: Path, folder: Path, template: str) -> Path:
    shutil.copytree(model, folder)
    about = {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def bare(offramp, tmp_path_factory):
    """A model of 64 positions without a chat template, whose answers depend on the question."""
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("bare") / "model"
    result = offramp(
        *("train", "--corpus", "pangram", "--layers", 4, "--dim", 16, "--heads", 2),
        *("--exits", "1,2", "--loss-weights", "1=0.3,2=0,4=0.7", "--steps", 30, "--lr", "1e-2"),
        *("--seq-len", 32, "--batch-size", 8, "--max-length", 64, "--tracker", "none"),
        *("--out", out),
    )
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def talker(bare, tmp_path_factory):
    """The same model with a chat template of its characters."""
    return with_template(bare, tmp_path_factory.mktemp("talker") / "model", TEMPLATE)


@pytest.fixture(scope="module")
def lm(talker):
    return library.load(talker)


@pytest.fixture
def piped(offramp, talker, monkeypatch):
    """Run the command with lines on standard input."""

    def run(lines, *flags, model=talker, new=NEW):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        monkeypatch.setattr("offramp.cli.chat.in_a_terminal", lambda: False)
        return offramp("chat", model, "--max-new-tokens", new, *flags)

    return run


@pytest.fixture
def typed(offramp, talker, monkeypatch):
    """Run the command with keys that a person presses."""
    toolkit = pytest.importorskip("prompt_toolkit.input")
    session = pytest.importorskip("prompt_toolkit.application").create_app_session
    output = pytest.importorskip("prompt_toolkit.output").DummyOutput()

    def run(keys, *flags):
        monkeypatch.setattr("offramp.cli.chat.in_a_terminal", lambda: True)
        with toolkit.create_pipe_input() as keyboard, session(keyboard, output):
            keyboard.send_bytes(keys if isinstance(keys, bytes) else keys.encode())
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
    result = piped("lazy dog\n\nfox\r\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == answers(lm, "lazy dog", "fox")
    assert result.stderr.count("mean layers 4.0 of 4") == 2


def test_a_system_message_begins_it_again_after_a_reset(piped, lm):
    result = piped("lazy dog\n/reset\nlazy dog\n", "--system", "dogs")
    first, second = result.stdout.splitlines()
    assert first == second == lm.generate("s dogs. u lazy dog. a ", max_new_tokens=NEW).text


def test_commands_choose_where_tokens_leave(piped, lm):
    result = piped("/threshold 0\nlazy dog\n/full\nfox\n/threshold\n/quit\nno answer\n")
    assert result.returncode == 0, result.stderr
    early = lm.generate("u lazy dog. a ", max_new_tokens=NEW, threshold=0.0)
    (one, two), said = result.stdout.splitlines(), result.stderr
    assert one == early.text
    assert two == lm.generate(f"u lazy dog. a {one}. u fox. a ", max_new_tokens=NEW).text
    assert f"mean layers {early.mean_layers:.1f} of 4" in said
    assert "Tokens leave at threshold 0.0." in said
    assert "Exits are decided by max_prob" in said
    assert said.count("Every token runs through all layers.") == 2


def test_flags_are_those_of_generate(piped, lm):
    drawn = answers(lm, "lazy dog", "fox", temperature=1.5, seed=3)
    result = piped("lazy dog\nfox\n", "--temperature", 1.5, "--seed", 3)
    assert result.stdout.splitlines() == drawn
    speculative = piped("lazy dog\n/speculative\nfox\n")
    assert speculative.stdout.splitlines() == answers(lm, "lazy dog", "fox")


@pytest.mark.parametrize(
    ("lines", "flags", "said"),
    [
        ("/threshhold 1\n", (), "command: expected one of /threshold, /full"),
        ("/threshold high\n", (), "threshold: expected a number"),
        ("/threshold nan\n", (), "threshold"),
        ("/threshold 1:1:1:1:1:1\n", (), "thresholds: expected 2"),
        ("x" * (1 << 20) + "\n", (), "prompt: expected lines of fewer than 1,048,576 bytes"),
        ("dog\n", ("--threshold", "1:1:1:1:1:1"), "thresholds: expected 2"),
        ("dog\n", ("--confidence", "gate", "--threshold", 1), "gate"),
        ("dog\n", ("--plain", "--system", "dogs"), "system: expected none with plain"),
    ],
)
def test_a_mistake_ends_a_script_with_one_sentence(piped, lines, flags, said):
    result = piped(f"{lines}dog\n", *flags)
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


def test_a_model_without_a_template_says_so_before_any_line(piped, bare):
    result = piped("lazy dog\n", model=bare)
    assert (result.returncode, result.stdout) == (2, "")
    assert "chat: expected a model with a chat template" in result.stderr


@pytest.mark.parametrize("template", ["{{ raise_exception('no such role') }}", "{% for %}"])
def test_a_template_that_fails_is_one_sentence(piped, bare, tmp_path, template):
    result = piped("dog\n", model=with_template(bare, tmp_path / "model", template))
    assert (result.returncode, result.stdout) == (2, "")
    assert "chat: expected a chat template that takes these messages, got: " in result.stderr
    assert result.stderr.count("\n") == 1


def test_plain_continues_one_text(piped, bare):
    result = piped("lazy dog\n fox\n", "--plain", model=bare)
    assert result.returncode == 0, result.stderr
    one, two = result.stdout.splitlines()
    lm = library.load(bare)
    assert one == lm.generate("lazy dog", max_new_tokens=NEW).text
    assert two == lm.generate(f"lazy dog{one} fox", max_new_tokens=NEW).text


def test_a_conversation_that_outgrows_the_model_is_told(piped, typed, lm):
    turn = "lazy dog\n"
    result = piped(turn * 9)
    assert result.returncode == 2
    assert "conversation: expected at most 64 tokens" in result.stderr
    assert "/reset" in result.stderr
    one, *rest = piped(turn, new=60).stderr.splitlines()
    assert "tokens/s" in one
    assert "cut, because the conversation has 64 tokens" in rest[0]
    result = typed(turn.replace("\n", "\r") * 9 + "/reset\rlazy dog\r/quit\r")
    assert result.returncode == 0, result.stderr
    assert "conversation: expected at most 64 tokens" in result.stderr
    shown = result.stdout.splitlines()
    assert shown[0] == shown[-1]


def test_a_person_types_commands(typed, lm):
    result = typed("lazy dog\r/nonsense\r/help\r/reset\rlazy dog\r\x04never\r")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == 2 * answers(lm, "lazy dog")
    assert "command: expected one of /threshold, /full" in result.stderr
    assert "got '/nonsense'" in result.stderr
    assert "/speculative" in result.stderr
    assert "4 layers, exits: 1, 2." in result.stderr


def test_alt_enter_begins_a_line_and_a_space_hides_a_command(typed, lm):
    result = typed("lazy\x1b\rdog\r /quit\r\x04")
    assert result.stdout.splitlines() == answers(lm, "lazy\ndog", " /quit")


def test_bytes_that_are_no_text_and_codes_of_colours_end_no_chat(typed, lm):
    result = typed(b"la\xff\xfezy\rlazy \x1b[31m\x1b[M !!dog\r\x1b[200~fox\x1b[31m\x1b[201~\r\x04")
    assert result.returncode == 0, result.stderr
    assert "message: expected text in UTF-8, got other bytes\n" in result.stderr
    assert result.stdout.splitlines() == answers(lm, "lazy dog", "fox\x1b[31m")


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
    result = typed("lazy\x03lazy dog\rfox\r\x03\x04")
    assert result.returncode == 0, result.stderr
    whole = answers(lm, "lazy dog")[0]
    one, two = result.stdout.splitlines()
    assert one == whole[:3]
    assert two == lm.generate(f"u lazy dog. a {one}. u fox. a ", max_new_tokens=NEW).text
    assert "Stopped; the conversation keeps the answer so far." in result.stderr
    assert result.stderr.count("Ctrl-D or /quit ends the chat.") == 2


def test_ctrl_c_ends_a_script(piped, monkeypatch):
    def stop(*arguments):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("offramp.cli.chat.show_tokens", lambda *_: stop)
    result = piped("lazy dog\nfox\n")
    assert result.returncode == 130
    assert "tokens/s" not in result.stderr


def test_without_prompt_toolkit_lines_still_work(offramp, piped, talker, monkeypatch):
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    assert piped("lazy dog\n").returncode == 0
    monkeypatch.setattr("offramp.cli.chat.in_a_terminal", lambda: True)
    result = offramp("chat", talker)
    assert result.returncode == 2
    assert result.stderr == (
        "offramp: chat: expected the library prompt_toolkit, which is not installed; "
        "pip install 'offramp[chat]'\n"
    )


def test_a_model_that_runs_only_whole_is_refused_before_the_first_message(lm):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": lm.model.vocab_size, "hidden_size": 16, "n_layer": 3, "n_head": 2}
    model = transformers.AutoModelForCausalLM.from_config(transformers.BloomConfig(**shape))
    opened = open_in_memory(model, lm.tokenizer)
    with pytest.raises(library.ConfigError, match=r"^chat: expected .* run one by one"):
        Conversation(opened, GenerateConfig(), plain=True)


def test_in_a_real_terminal(talker):
    """Colours, an earlier line, Ctrl-C at the prompt and Ctrl-D, in a pseudo-terminal."""
    pytest.importorskip("prompt_toolkit")
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="80", PROMPT_TOOLKIT_NO_CPR="1")
        command = [sys.executable, "-m", "offramp", "chat", str(talker), "--threshold", "0"]
        os.execv(sys.executable, [*command, "--max-new-tokens", str(NEW), "--threads", "1"])

    def until(*expected: bytes) -> bytes:
        """Read until all of this was printed, and the prompt after it."""
        seen, deadline = b"", time.monotonic() + 120
        while not all(each in seen for each in (*expected, b"\x1b[?2004h")):
            assert time.monotonic() < deadline, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096)
        return seen

    until(b"ends the chat.")
    os.write(terminal, b"lazy dog\r")
    until(b"\x1b[38;5;", b"exit layer: ", b"mean layers")
    os.write(terminal, b"\x03")
    until(b"Ctrl-D or /quit")
    os.write(terminal, b"\x1b[A")
    time.sleep(0.5)
    os.write(terminal, b"\r")
    assert b"> lazy dog" in until(b"mean layers")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
