"""The cache folder of offramp: OFFRAMP_CACHE, or the user's cache folder."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return the cache folder for ``kind``, which is ``tokens``, ``models`` or ``checked``."""
    usual = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "offramp"
    return Path(os.environ.get("OFFRAMP_CACHE", usual)) / kind
