"""The cache folder of offramp: OFFRAMP_CACHE, or the user's cache folder."""

import os
from pathlib import Path

from offramp.errors import ConfigError


def cache_folder(kind: str) -> Path:
    """Return the cache folder for ``kind``, which is ``tokens``, ``models`` or ``checked``.

    An empty variable counts as none. Raises ConfigError for the home folder of an unknown user.
    """
    own = os.environ.get("OFFRAMP_CACHE")
    usual = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return (Path(own).expanduser() if own else Path(usual).expanduser() / "offramp") / kind
    except RuntimeError:
        name = "OFFRAMP_CACHE" if own else "XDG_CACHE_HOME"
        raise ConfigError(
            f"{name}: expected a folder of a known user, got {own or usual}"
        ) from None
