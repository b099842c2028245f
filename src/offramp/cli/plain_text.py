"""Text from and to the user, as it is: prompts in UTF-8, and generated text on standard output."""

import sys
from collections.abc import Iterator

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from offramp.errors import ConfigError
from offramp.printable import printable

_COLOURS = {
    "standard": ColorSystem.STANDARD,
    "256": ColorSystem.EIGHT_BIT,
    "truecolor": ColorSystem.TRUECOLOR,
    "windows": ColorSystem.WINDOWS,
}
LONGEST_LINE = 1 << 20
"""Largest number of bytes of a line of standard input."""


def write_text(console: Console, text: str, style: str = "") -> None:
    """Write text as it is. In a terminal it may have a colour, and control characters are shown.

    Line breaks and tabs are never changed. What is no terminal gets every character.
    """
    if console.is_terminal:
        text = printable(text, lines=True)
        colours = None if console.no_color else _COLOURS.get(console.color_system or "")
        if style and text:
            text = Style.parse(style).render(text, color_system=colours)
    console.file.write(text)
    console.file.flush()


def standard_input() -> str:
    """Return the prompt on standard input, in UTF-8, without the line break at its end."""
    return _read(-1).removesuffix("\n")


def standard_lines() -> Iterator[str]:
    """Yield the lines of standard input as they come, in UTF-8, without their line breaks."""
    while line := _read(LONGEST_LINE):
        yield line.removesuffix("\n")


def _read(at_most: int) -> str:
    """Return the next line of standard input; all of it if ``at_most``, its length, is -1."""
    if sys.stdin is None:
        raise ConfigError("prompt: expected UTF-8 on standard input, which is closed")
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    try:
        data = stream.read() if at_most < 0 else stream.readline(at_most)
        if 0 <= at_most <= len(data):
            raise ConfigError(
                f"prompt: expected lines of fewer than {at_most:,} bytes, got a longer one"
            )
        text = data if isinstance(data, str) else data.decode("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
        raise ConfigError(f"prompt: expected UTF-8 on standard input, got {reason}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
