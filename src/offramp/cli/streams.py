"""What comes from and goes to the shell: arguments in UTF-8, and closed, full or narrow streams."""

import errno
import os
import re
import sys
from pathlib import Path

BROKEN_PIPE = 141
"""Exit code if the reader of standard output is gone: 128 + SIGPIPE, as that of other programs."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def prepare_streams() -> None:
    """Write characters that an encoding does not have as escapes; a closed stream takes nothing."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        if reconfigure := getattr(getattr(sys, name), "reconfigure", None):
            reconfigure(errors="backslashreplace")


def output_failure(error: OSError | None = None) -> str | None:
    """Return why standard output cannot be written, or None; what it still holds is dropped.

    ``error`` was raised by the command; without the name of a file it may be of standard output.
    """
    reason = None
    if error is not None and error.filename is None and error.errno in _FULL:
        reason = error.strerror
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as failed:
            reason = reason or failed.strerror or str(failed)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return reason


def utf8(argument: str) -> str | None:
    """Return an argument of the command line read as UTF-8, or None if it is not UTF-8.

    Where the locale is not UTF-8, Python reads the bytes that it does not know as lone surrogates.
    """
    if not re.search("[\ud800-\udfff]", argument):
        return argument
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return None
