"""Text that is safe to print: control characters are shown, and never reach a terminal.

A name, a corpus, a vocabulary or a library's error may contain characters that a terminal obeys
(set the title, clear the screen, write to the clipboard) or that change the order in which text is
shown. ``printable`` writes them as Python does: ESC is ``\\x1b``.
"""

import re

_CONTROL = "\x00-\x1f\x7f-\x9f"
_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_INVISIBLE = (
    "\u00ad\u200b\u2028\u2029\u2060-\u2064\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
)
_UNSAFE = re.compile(f"[{_CONTROL}{_BIDIRECTIONAL}{_INVISIBLE}\ud800-\udfff]")
_UNSAFE_IN_TEXT = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def printable(text: str, *, lines: bool = False) -> str:
    """Return a text with its unsafe characters as escapes.

    These are control characters, marks that change the direction of text, invisible characters
    and lone surrogates. With ``lines``, line breaks and tabs stay. Text without such characters is
    returned as it is.
    """
    return (_UNSAFE_IN_TEXT if lines else _UNSAFE).sub(_escape, text)


def _escape(unsafe: re.Match[str]) -> str:
    return unsafe[0].encode("unicode_escape").decode("ascii")
