"""The app: its commands, each imported when it is called, and how it reads values.

Neither this module nor those of the commands import PyTorch, so that help and a user's mistake
are answered at once.
"""

import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, get_args, get_origin

import cyclopts
from cyclopts import App, Parameter

from offramp.cli.config_file import read_config_file
from offramp.cli.help_groups import GroupedHelp
from offramp.cli.memory import memory_sentence
from offramp.cli.streams import utf8
from offramp.errors import OfframpError, OfframpWarning
from offramp.printable import printable
from offramp.version import __version__

COMMANDS = (
    "bench",
    "calibrate",
    "card",
    "chat",
    "confidence",
    "evaluate",
    "export",
    "generate",
    "plot",
    "probe",
    "push",
    "quantise",
    "recipe",
    "reproduce",
    "serve",
    "specialise",
    "study",
    "sweep",
    "train",
    "tune",
)
"""Each is the function of its name in the module of its name."""
LAUNCHER_SECONDS = 10
LONGEST_SENTENCE = 4000  # characters
FLAGS = {  # a config's field: its flag, where they differ
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv-heads",
    "intermediate_size": "hidden",
    "exit_layers": "exits",
    "kv_source_layer": "kv-source",
    "upper_intermediate_size": "upper-hidden",
    "max_position_embeddings": "max-length",
}

NO_FLAG = (
    *("vocab_size", "weight_format", "threshold", "decay", "missing_kv"),
    *("stop_strings", "stop_tokens"),
)
"""Fields of configs that no flag sets by itself: the tokenizer or the command does."""


def _convert(type_: Any, tokens: Sequence[cyclopts.Token]) -> Any:
    """Cyclopts' own conversion, with a list written as one word: 2,4."""
    for token in tokens if type_ in (int, int | None) else ():
        if not re.fullmatch(r"\s*[+-]?[0-9_]+\s*", token.value):
            raise cyclopts.CoercionError(token=token, target_type=int)
        if len(token.value) > 19 and abs(int(token.value[:99])) >= 1 << 63:
            raise cyclopts.CycloptsError(
                msg=f"{token.keyword}: expected a number below 2^63, got {token.value}"
            )
    if any(
        get_origin(part) is tuple for part in (type_, *get_args(type_))
    ):  # a list, or perhaps none
        tokens = [
            token.evolve(value=part.strip()) for token in tokens for part in token.value.split(",")
        ]
    return cyclopts.convert(type_, tokens)


app = App(
    name="offramp",
    help="Early-exit Transformer language models: train exits and measure them.",
    version=__version__,
    version_flags=("--version", "-V"),
    version_format="plaintext",  # markdown would import a parser of it
    help_formatter=GroupedHelp(),
    config=read_config_file,
    default_parameter=Parameter(
        converter=_convert,
        negative_iterable=(),
        name_transform=lambda field: FLAGS.get(field, cyclopts.default_name_transform(field)),
        parse=re.compile(rf"^(?!({'|'.join(NO_FLAG)})$)"),
    ),
)
for command in COMMANDS:
    app.command(f"offramp.cli.{command}:{command}")
app.register_install_completion_command(help="Install completion for this shell (or --shell).")


@app.command(name="help")
def show_help(*command: str) -> None:
    """Show the help of a command, as its --help does.

    Parameters
    ----------
    command
        The command (default: offramp itself).
    """
    if command and command[0] not in app:
        app.parse_args(command, exit_on_error=False, print_error=False)  # names the nearest one
    app.help_print(command)


def run(arguments: Sequence[str] | None) -> None:
    """Run the command that the arguments name; a user's mistake is a sentence and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if sys.flags.optimize > 1:
        say_line(
            "Python: expected its docstrings, which some packages read, but -OO or "
            "PYTHONOPTIMIZE=2 removes them; use -O"
        )
        sys.exit(2)
    for argument in given:
        if utf8(argument) is None:
            say_line(f"expected arguments in UTF-8, got {argument!r}")
            sys.exit(2)
        if "\0" in argument:
            say_line(f"expected arguments without the character NUL, got {argument!r}")
            sys.exit(2)
    if given in ([], ["help"]) or given[0] in app.help_flags:  # the list of all commands
        for name in COMMANDS:
            _ = app[name].help  # reads the command's module
    try:
        with _spoken_warnings():
            app(given, exit_on_error=False, print_error=False, result_action="return_value")
    except (cyclopts.CycloptsError, OfframpError) as error:
        sentence = _unknown_option(given) or _one_line(str(error))
        field, colon, rest = sentence.partition(":")  # a config's field, by its flag's name
        if not is_first_process():  # rank 0 says it, and its launcher ends this process meanwhile,
            time.sleep(LAUNCHER_SECONDS)  # unless only this one failed
        say_line(f"{FLAGS.get(field, field)}{colon}{rest}")
        sys.exit(2)
    except (MemoryError, RuntimeError, OSError, ImportError, SystemError) as error:
        found = memory_sentence(error)
        if found is None and isinstance(error, OSError) and error.filename is not None:
            found = _one_line(f"{error.filename}: {error.strerror}")
        if found is None:
            raise
        say_line(found)
        sys.exit(2)


def _one_line(said: str) -> str:
    """Return an error's sentence on one line, with endless words and lists cut."""
    line = re.sub(r"\S{1000,}", lambda word: f"{word[0][:80]}...", " ".join(said.split()))
    return line if len(line) <= LONGEST_SENTENCE else f"{line[:LONGEST_SENTENCE]}..."


def say_line(sentence: str) -> None:
    """Print one line on standard error; nothing in it is obeyed by a terminal."""
    print(f"offramp: {printable(sentence)}", file=sys.stderr)


@contextmanager
def _spoken_warnings() -> Iterator[None]:
    """Print offramp's own warnings as lines; those of other packages as they are."""
    show = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, OfframpWarning):
            show(message, category, *place, **more)
        elif is_first_process():
            say_line(" ".join(str(message).split()))

    with warnings.catch_warnings():
        warnings.simplefilter("always", OfframpWarning)
        warnings.showwarning = shown
        yield


def _unknown_option(given: Sequence[str]) -> str | None:
    """What to say of a mistyped option of ``offramp`` itself; to cyclopts it is a command."""
    if not given or not given[0].startswith("-") or given[0] in app:
        return None
    options = [name for name in app if name.startswith("--")]
    nearest = get_close_matches(given[0], options, n=1)
    return f"Unknown option: {given[0]}." + "".join(f" Did you mean {name}?" for name in nearest)


def is_first_process() -> bool:
    """Whether this is the process that speaks, of those that a launcher may have started."""
    return os.environ.get("RANK", "0") == "0"
