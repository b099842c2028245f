"""Text and tables in Markdown, in which text from outside changes nothing."""

import re
from collections.abc import Iterable, Sequence

from offramp.printable import printable

_SPECIAL = re.compile(r"[\\`*_{}\[\]()<>#|!&~$@^=]|(?<=www)\.|:(?=//)")
_LONGEST = 200


def escaped(text: object) -> str:
    """Return text from outside on one line, in which no character is markup, a link or HTML."""
    line = printable(" ".join(str(text).split()))
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", line)


def code(text: object) -> str:
    """Return text from outside as code, without the characters that would end it."""
    return f"`{re.sub('[`|]', '', printable(' '.join(str(text).split()))[:_LONGEST])}`"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the cells are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
