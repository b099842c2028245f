"""Read outside files: none blocks, none is too large, and what they hold fits a schema.

A file is a regular file of at most a number of bytes, which is checked before it is read. Its
content is parsed and then fitted to a dataclass or a ``msgspec.Struct`` by ``offramp.schema``.
Whatever is wrong is one CheckpointError that names the file and the field.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from offramp.errors import CheckpointError, ConfigError, OfframpError
from offramp.schema import fitting, shown

Value = TypeVar("Value")
JSON_BYTES = 64 << 20
"""Largest JSON or TOML file that is read."""
ARRAY_BYTES = 4 << 30
"""Largest file of arrays that is read, before and after it is unpacked."""


def read_json(path: Path, *, at_most: int = JSON_BYTES) -> Any:
    """Parse a JSON file. Raises CheckpointError if it is missing or not readable JSON."""
    data = read_bytes(path, at_most=at_most)
    try:
        return parse_json(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected readable JSON, got {error}") from None


def read_as(
    type_: type[Value], path: Path, *, foreign: bool = False, at_most: int = JSON_BYTES
) -> Value:
    """Return the value of ``type_`` that a JSON file holds.

    ``foreign`` files, which other programs write, may have other fields, too. Raises
    CheckpointError, which names the file and the field.
    """
    return value_of(type_, read_json(path, at_most=at_most), path, foreign=foreign)


def value_of(type_: type[Value], content: Any, path: Path, *, foreign: bool = False) -> Value:
    """Return the value of ``type_`` with the content of a file. Raises CheckpointError."""
    try:
        return fitting(type_, content, foreign=foreign)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for a key that occurs twice and for text that is no Unicode."""
    content = json.loads(text, object_pairs_hook=_once)
    if "\\ud" in text or "\\uD" in text:  # perhaps half a character
        json.dumps(content, ensure_ascii=False).encode()
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return found


def read_bytes(path: Path, *, at_most: int) -> bytes:
    """Return the bytes of a regular file of at most ``at_most`` bytes. Raises CheckpointError."""
    with open_regular(path, at_most=at_most) as file:
        try:
            return file.read()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def read_arrays(path: Path, expected: str) -> dict[str, Any]:
    """Return the arrays of an npz file by name; pickles and what unpacks to too much are refused.

    ``expected`` says what the file should contain. Raises CheckpointError.
    """
    import numpy as np

    with (
        parsing(path, expected),
        open_regular(path, at_most=ARRAY_BYTES) as file,
        np.load(file, allow_pickle=False) as stored,
    ):
        size = sum(member.file_size for member in stored.zip.infolist())
        if size > ARRAY_BYTES:
            raise CheckpointError(
                f"{path}: expected at most {ARRAY_BYTES:,} unpacked bytes, got {size:,}"
            )
        return {name: stored[name] for name in stored.files}


def check_format(content: Any, newest: int, path: Path, what: str) -> dict[str, Any]:
    """Return the content of a file if it has a format from 1 to ``newest``.

    ``what`` names what the file describes. Raises CheckpointError for any other content.
    """
    stored: dict[str, Any] = content if isinstance(content, dict) else {}
    found = stored.get("format")
    if type(found) is int and found > newest:
        raise CheckpointError(
            f"{path}: expected {what} of a format up to {newest}, got format {shown(found)}, which "
            "a newer offramp wrote; pip install --upgrade offramp"
        )
    if type(found) is not int or found < 1:
        raise CheckpointError(f"{path}: expected {what} of format {newest}, got {shown(found)}")
    return stored


@contextmanager
def open_regular(path: Path, *, at_most: int | None = None) -> Iterator[IO[bytes]]:
    """Open a regular file for reading, without ever waiting as a pipe makes its reader wait.

    Raises CheckpointError if there is none, if it is a folder, a pipe or a device, and if it has
    more than ``at_most`` bytes.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a file, found none") from None
    except (OSError, ValueError) as error:  # ValueError for a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read: {reason}") from None
    about = os.fstat(number)
    if not stat.S_ISREG(about.st_mode):
        os.close(number)
        raise CheckpointError(f"{path}: expected a file, got {_kind(about.st_mode)}")
    with os.fdopen(number, "rb") as file:
        if at_most is not None and about.st_size > at_most:
            raise CheckpointError(
                f"{path}: expected at most {at_most:,} bytes, got {about.st_size:,}"
            )
        yield file


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def parsing(path: Path, expected: str) -> Iterator[None]:
    """Convert errors from content of a wrong kind to a CheckpointError that names the file.

    ``expected`` says what the file should contain. Errors of offramp are not changed. Whatever
    else a parser raises counts as wrong content, and so does a panic of a library in Rust.
    """
    try:
        yield
    except OfframpError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        said = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{path}: expected {expected}, got: {said}") from None


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a library in Rust, which is no ``Exception``."""
    return type(error).__name__ == "PanicException"
