"""Text from and to the user, as it is: prompts in UTF-8, and generated text on standard output."""

import sys

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
    if sys.stdin is None:
        raise ConfigError("prompt: expected UTF-8 on standard input, which is closed")
    try:
        binary = getattr(sys.stdin, "buffer", None)
        text = str(sys.stdin.read()) if binary is None else binary.read().decode("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
        raise ConfigError(f"prompt: expected UTF-8 on standard input, got {reason}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
