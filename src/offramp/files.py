"""Read and write JSON and safetensors files.

Each file is written under a temporary name in the same folder, synced to disk and then renamed,
so a file with its final name is always complete. Weights are safetensors; nothing loads a pickle.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open

from offramp.errors import CheckpointError
from offramp.reading import open_regular
from offramp.reading import parsing as parsing
from offramp.reading import read_json as read_json


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success, sync it and rename it to ``path``."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        obey_umask(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def obey_umask(path: Path) -> None:
    """Give a file the permissions of a new one: safetensors lets only its owner read it."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    with suppress(OSError):  # some file systems have no permissions to set
        path.chmod(0o666 & ~mask)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file completely or not at all. Infinity is written as "inf" or "-inf"."""
    text = json.dumps(_without_infinity(content), indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def _without_infinity(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _without_infinity(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_infinity(value) for value in content]
    return str(content) if isinstance(content, float) and math.isinf(content) else content


def check_free(out: Path) -> None:
    """Raise a CheckpointError unless ``out`` can become a new folder, or is an empty one."""
    try:
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out}: expected a folder to write to, got a file")
        if out.exists() and any(out.iterdir()):
            raise CheckpointError(
                f"{out}: expected a new or empty folder, but it holds another run or other files; "
                "choose another --out, or remove it first"
            )
        above = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise CheckpointError(f"{out}: expected a folder that can be written to")
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made: {error.strerror}") from None


def claim_folder(out: Path) -> None:
    """Create a folder for a run, or use an empty one. Raises CheckpointError as ``check_free``."""
    check_free(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made: {error.strerror}") from None


def claim_marked(marker: Path, content: Any) -> None:
    """Claim the folder of ``marker`` with ``claim_folder``, and write ``content`` to ``marker``.

    Temporary files of ``marker`` that a killed process left behind are removed first.
    """
    for left in marker.parent.glob(f".{marker.name}.*.tmp"):
        left.unlink(missing_ok=True)
    claim_folder(marker.parent)
    write_json(marker, content)


def read_tensors(path: Path) -> dict[str, Any]:
    """Return all tensors of a safetensors file. Raises CheckpointError if it is not readable."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def count_tensors(path: Path) -> int:
    """Return the number of tensors in a safetensors file, from its header.

    Raises CheckpointError if the file is not complete.
    """
    with _opened(path) as file:
        return len(file.keys())


def count_parameters(path: Path) -> int:
    """Return the number of parameters in a safetensors file, from its header."""
    with _opened(path) as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with open_regular(path):  # safetensors waits for a pipe
        pass
    with parsing(path, "whole safetensors"), safe_open(path, framework="pt") as file:
        yield file


def file_sha256(*paths: Path) -> str:
    """Return the SHA-256 of the concatenated files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while piece := file.read(1 << 22):
                    digest.update(piece)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def stored_fields(config: Any, format_fields: Collection[str]) -> dict[str, Any]:
    """Return the fields of a dataclass that a stored format contains, in the order of the class.

    ``format_fields`` are the names of the fields that the format always contains. A field that
    was added later is included only if it differs from its default, so records that were stored
    before the field existed still compare equal. The default of such a field must not change
    within a format.
    """
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name in format_fields or getattr(config, field.name) != _default(field)
    }


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default
