"""Find the tasks that come with the harness without reading all of its YAML files as YAML.

The harness's own index parses some 14,000 files, which takes many seconds. A task that is named in
full is found by one line of its file.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from offramp.commands.evaluate.library import harness

_NAMES = re.compile(
    rb"^(?:task|group|tag)[ \t]*:[ \t]*([^\s#].*)$|^tag[ \t]*:[ \t]*\n((?:[ \t]*-[ \t].*\n)+)",
    re.MULTILINE,
)
_WORD = re.compile(rb"[^\s\"'\[\],]+")
_PATTERN = re.compile(r"[*?\[]")


def builtin_folder() -> Path:
    """Return the folder of the harness's tasks."""
    return Path(harness("tasks").__file__).parent


def is_pattern(name: str) -> bool:
    """Return whether a name stands for several, as mmlu_* does."""
    return bool(_PATTERN.search(name))


def named_files() -> dict[str, list[Path]]:
    """Return the files that name each task, group and tag of the harness."""
    found: dict[str, list[Path]] = {}
    for path in sorted(builtin_folder().glob("**/*.yaml")):
        for parts in _NAMES.findall(path.read_bytes()):
            for word in _WORD.findall(b" ".join(parts)):
                files = found.setdefault(word.decode("utf-8", "replace"), [])
                if path not in files:
                    files.append(path)
    return found


def add_named(index: dict[str, Any], names: Iterable[str], files: dict[str, list[Path]]) -> bool:
    """Add the harness's tasks of these names to an index of tasks; return whether all are there.

    A group, a tag and a pattern stand for others, so that they need the harness's whole index.
    """
    read, indexing = harness("tasks._yaml_loader").load_yaml, harness("tasks._index")
    single = (indexing.Kind.TASK, indexing.Kind.PY_TASK)
    for name in names:
        if name in index:
            continue
        if is_pattern(name):
            return False
        own: dict[str, Any] = {}
        for path in files.get(name, ()):
            indexing.TaskIndex.process_cfg(read(path, resolve_func=False), path, own)
        if name not in own or own[name].kind not in single:
            return False
        index[name] = own[name]
    return True
