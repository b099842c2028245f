"""Lines that a person types in a terminal, with the keys of a shell: prompt_toolkit."""

import sys
from collections.abc import Callable, Iterator, Sequence

from offramp.cli.base import say
from offramp.cli.streams import utf8
from offramp.errors import ConfigError


def in_a_terminal() -> bool:
    """Return whether a person types, and sees what is printed."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def typed_lines(words: Sequence[str]) -> Iterator[str]:
    """Yield what a person types. The arrow keys bring back earlier lines, which no file keeps.

    Tab completes ``words``, and Alt-Enter begins a new line of the same message. Raises ConfigError
    if the library prompt_toolkit is not installed.
    """
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.keys import Keys
    except ImportError:
        raise ConfigError(
            "chat: expected the library prompt_toolkit, which is not installed; "
            "pip install 'offramp[chat]'"
        ) from None
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add(Keys.Vt100MouseEvent)
    def nothing(event: KeyPressEvent) -> None:
        """Ignore the mouse, and colour codes that look like it: prompt_toolkit fails on those."""

    session: PromptSession[str] = PromptSession(
        "> ",
        completer=WordCompleter(words, sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
    )
    return _prompted(session.prompt)


def _prompted(prompt: Callable[[], str]) -> Iterator[str]:
    while True:
        try:
            line = utf8(prompt())
        except KeyboardInterrupt:
            say("Ctrl-D or /quit ends the chat.")
        except EOFError:
            return
        else:
            if line is None:
                say("message: expected text in UTF-8, got other bytes")
            else:
                yield line
