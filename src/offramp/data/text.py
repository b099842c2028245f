"""Text that is read in pieces, so that it may be larger than memory."""

import codecs
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from offramp.errors import CorpusError

_READ_BYTES = 1 << 20
_BETWEEN = b"\xff"  # UTF-8 text never contains this byte


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The length and hash of a text, from one pass over it."""

    characters: int
    sha256: str
    "SHA-256 of the UTF-8 text."


@dataclass(frozen=True)
class Text:
    """A text that is read piece by piece, from the beginning at each iteration."""

    pieces: Callable[[], Iterable[str]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces())

    def part(self, start: int, stop: int | None = None) -> "Text":
        """Return the characters from ``start`` to ``stop`` as another text."""

        def pieces() -> Iterator[str]:
            at = 0
            for piece in self:
                if stop is not None and at >= stop:
                    return
                cut = piece[max(start - at, 0) : None if stop is None else stop - at]
                if cut:
                    yield cut
                at += len(piece)

        return Text(pieces)

    def scan(self) -> Scan:
        """Read the text once and return its length and hash."""
        hashed, characters = hashlib.sha256(), 0
        for piece in self:
            hashed.update(piece.encode("utf-8"))
            characters += len(piece)
        return Scan(characters=characters, sha256=hashed.hexdigest())

    def is_blank(self) -> bool:
        """Return whether the text is only white space; stops reading at the first other piece."""
        return not any(piece.strip() for piece in self)

    def read(self) -> str:
        """Read the whole text into memory."""
        return "".join(self)


def sha256(*texts: Iterable[str]) -> str:
    """Return the SHA-256 of UTF-8 texts, separated by a byte that UTF-8 never contains."""
    hashed = hashlib.sha256()
    for index, text in enumerate(texts):
        hashed.update(_BETWEEN if index else b"")
        for piece in text:
            hashed.update(piece.encode("utf-8"))
    return hashed.hexdigest()


def files_text(files: Iterable[Path]) -> Text:
    """Return the text of UTF-8 files, joined by line breaks."""
    paths = tuple(files)

    def pieces() -> Iterator[str]:
        for index, path in enumerate(paths):
            if index:
                yield "\n"
            yield from _read_file(path)

    return Text(pieces)


def _read_file(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line_breaks = io.IncrementalNewlineDecoder(None, translate=True)  # \r\n and \r become \n
    offset = 0
    try:
        with path.open("rb") as file:
            while True:
                read = file.read(_READ_BYTES)
                text = decoder.decode(read, final=not read)
                offset += len(read)
                if piece := line_breaks.decode(text, final=not read):
                    yield piece
                if not read:
                    return
    except UnicodeDecodeError as error:  # its object: the rest of the last read, and this read
        at = offset + len(read) - len(error.object) + error.start
        raise CorpusError(
            f"{path}: expected UTF-8 text, got a byte that is not UTF-8 at offset {at}"
        ) from None
    except OSError as error:
        raise CorpusError(f"{path}: expected a readable file, got: {error.strerror}") from None
