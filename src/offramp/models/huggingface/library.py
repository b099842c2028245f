"""The library transformers, imported when it is first needed, and kept quiet."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from offramp.errors import CheckpointError


def transformers() -> Any:
    """The library, imported when it is first needed."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise CheckpointError(
            "expected the library transformers, which is not installed; pip install offramp[hf]"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers neither log nor draw progress bars."""
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
