"""Import the library transformers on first use, without its log messages."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from offramp.errors import CheckpointError


def transformers() -> Any:
    """Return the library, which is imported on first use."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise CheckpointError(
            "expected the library transformers, which is not installed; pip install 'offramp[hf]'"
        ) from None


def installed() -> bool:
    """Return whether the library is installed, without importing it."""
    return importlib.util.find_spec("transformers") is not None


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off the log messages and progress bars of transformers."""
    logging = transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
