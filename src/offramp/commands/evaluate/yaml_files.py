"""Read the YAML files of tasks, and find what would run code when a task is loaded from them."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offramp.commands.evaluate.library import harness
from offramp.data.hub import one_line
from offramp.errors import ConfigError
from offramp.reading import read_bytes

YAML_BYTES = 4 << 20
"""Largest YAML file that is read."""
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "binary", "merge")
_PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in _KINDS)
"""Tags of values that are data."""
_CODE_KEYS = ("class", "custom_dataset", "use_prompt")
_CODE_SWITCHES = ("unsafe_code", "hf_evaluate")
_PICKLES = ("pandas",)
"""Builders of ``datasets`` that read pickles."""
_SKIPPED = ("__pycache__", ".ipynb_checkpoints")


def yaml_files(path: Path) -> list[Path]:
    """Return the YAML files at a path, which is one or a folder; a ConfigError if there is none."""
    try:
        if path.is_dir():
            found = [
                each
                for each in sorted(path.glob("**/*.yaml"))
                if not set(each.parts) & set(_SKIPPED)
            ]
        else:
            found = [path] if path.exists() else []
    except OSError as error:
        raise ConfigError(f"tasks_path: {path} cannot be read: {error.strerror}") from None
    if not found:
        raise ConfigError(
            f"tasks_path: expected a YAML file, or a folder with files that end in .yaml, "
            f"got {path}"
        )
    return found


def find_code(path: Path, *, seen: set[Path] | None = None) -> str | None:
    """Return what in a YAML file, or in a file that it includes, runs code; None if nothing does.

    Raises ConfigError for a file that is no YAML, and CheckpointError for one that cannot be read.
    """
    seen = set() if seen is None else seen
    path = path.expanduser().resolve()
    if path in seen:
        return None
    seen.add(path)
    root = _composed(path)
    for name, value in _entries(root):
        if why := _runs_code(name, value):
            return f"{path.name}: {why}"
        if name == "include":
            for included in _scalars(value):
                if found := find_code(path.parent / included, seen=seen):
                    return found
    tags = (node.tag for node in _nodes(root) if node.tag not in _PLAIN)
    if tag := next(tags, None):
        return f"{path.name}: {tag}"
    return None


def _composed(path: Path) -> Any:
    """Return the root node of a YAML file; no value is made from it."""
    yaml = importlib.import_module("yaml")
    data = read_bytes(path, at_most=YAML_BYTES)
    try:
        return yaml.compose(data.decode("utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: expected a YAML file, got: {one_line(error)}") from None


def _nodes(root: Any) -> Iterator[Any]:
    """Yield every node once, also those that aliases name again."""
    waiting, seen = [] if root is None else [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node.value, list):
            for part in node.value:
                waiting.extend(part if isinstance(part, tuple) else (part,))


def _entries(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield (key, node of the value) of every mapping."""
    for node in _nodes(root):
        for part in node.value if isinstance(node.value, list) else ():
            if isinstance(part, tuple) and isinstance(part[0].value, str):
                yield part[0].value, part[1]


def _scalars(node: Any) -> list[str]:
    nodes = node.value if isinstance(node.value, list) else [node]
    return [each.value for each in nodes if isinstance(each.value, str)]


def _runs_code(name: str, node: Any) -> str:
    """Say what an entry of a task's config would run; empty if nothing."""
    written = node.value if isinstance(node.value, str) else ""
    if name in _CODE_KEYS:
        return name
    if name in _CODE_SWITCHES and written.lower() not in ("false", "no", "off", "n"):
        return name
    if name == "metric" and written not in _metrics():
        return f"metric {written!r}, which is code of the library evaluate"
    if name == "dataset_path" and (written in _PICKLES or written.endswith(".py")):
        return f"dataset_path {written!r}"
    return ""


def _metrics() -> Any:
    harness("api.metrics")
    return harness("api.registry").metric_registry
