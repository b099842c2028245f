"""Failures of the tokenizers library: a plain Exception, or a panic in Rust, becomes a sentence."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from tokenizers import Tokenizer

from offramp.data.hub import one_line
from offramp.errors import CorpusError
from offramp.reading import is_panic

_TRIAL = "A few words, 12.5 \u00e9\n\tand more."


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of token ids. Raises CorpusError if the tokenizer fails."""
    with failing("tokenizer: expected one that can decode its tokens"):
        return str(tokenizer.decode(ids))


def try_out(tokenizer: Tokenizer, spec: str) -> None:
    """Raise a CorpusError for a tokenizer at which the library panics.

    ``spec`` is its name. A tokenizer that only lacks a token for the words of the trial is fine.
    """
    with failing(f"tokenizer {spec}: expected one that can encode and decode a text"), silent():
        for special in (True, False):
            with suppress(Exception):
                tokenizer.decode(tokenizer.encode(_TRIAL, add_special_tokens=special).ids)


@contextmanager
def failing(expected: str) -> Iterator[None]:
    """Convert a failure of the library to a CorpusError; ``expected`` begins its sentence."""
    try:
        yield
    except BaseException as error:
        if not is_failure(error):
            raise
        raise CorpusError(f"{expected}, got: {one_line(error)}") from None


def is_failure(error: BaseException) -> bool:
    """Return whether an error is the tokenizers library's: a plain Exception, or a panic."""
    return isinstance(error, Exception) or is_panic(error)


@contextmanager
def silent() -> Iterator[None]:
    """Drop what the library writes to standard error by itself: where in Rust it failed."""
    with suppress(AttributeError, OSError):
        sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
