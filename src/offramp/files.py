"""Write JSON and safetensors files, and read safetensors.

Each file is written under a temporary name in the same folder, synced to disk and then renamed,
so a file with its final name is always complete. Weights are safetensors; nothing loads a pickle.
"""

import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open

from offramp.errors import CheckpointError
from offramp.reading import open_regular, parsing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success, sync it and rename it to ``path``.

    If ``path`` is a link, the file that it names is replaced. A device, a pipe or a FIFO is not
    replaced: the content is written into it. On any error ``path`` stays as it was. Raises
    CheckpointError if it cannot be written.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            with TemporaryDirectory() as folder:
                yield (aside := Path(folder) / path.name)
                _write_into(path, aside)
            return
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise OSError(errno.ELOOP, "its links form a circle")
        with temporary_folder(target) as folder:
            yield (aside := folder / target.name)
            obey_umask(aside)
            sync(aside)
            aside.replace(target)
        sync(target.parent)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Create a hidden folder beside ``target``, and remove it at the end.

    Those for the same target of processes of this machine that have ended are removed first;
    other machines may share the folder above.
    """
    name = f".{target.name[:100]}.{socket.gethostname()[:100]}"
    for left in target.parent.glob(f"{glob.escape(name)}.*.tmp"):
        pid = left.name.removeprefix(f"{name}.").removesuffix(".tmp")
        if pid.isdecimal() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            remove(left)
    folder = target.with_name(f"{name}.{os.getpid()}.tmp")
    try:
        folder.mkdir()
        yield folder
    finally:
        remove(folder)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _write_into(path: Path, aside: Path) -> None:
    """Write the content of ``aside`` into a device or a pipe, which must have a reader."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected the name of a file, got a folder")
    with aside.open("rb") as file, open(_descriptor_of(path), "wb") as out:
        shutil.copyfileobj(file, out)


def _descriptor_of(path: Path) -> int:
    there = path.stat()
    for own in (1, 2):  # standard output may be a pipe that cannot be opened again
        with suppress(OSError):
            if os.path.samestat(os.fstat(own), there):
                return os.dup(own)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "expected a program that reads from this pipe") from None
        raise
    os.set_blocking(descriptor, True)
    return descriptor


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert the errors of a write, such as a full disk, to a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {reason(error)}") from None


def reason(error: Exception) -> str:
    """Return the cause of an error of the system as words on one line."""
    said = " ".join((getattr(error, "strerror", None) or str(error) or repr(error)).split())
    return re.sub(r"^.*I/O error: (.*?) \(os error \d+\).*$", r"\1", said)  # of safetensors


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def obey_umask(path: Path) -> None:
    """Give a file the permissions of a new one: safetensors lets only its owner read it."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    with suppress(OSError):  # some file systems have no permissions to set
        path.chmod(0o666 & ~mask)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file completely or not at all. Infinity is written as "inf" or "-inf"."""
    text = json.dumps(_without_infinity(content), indent=2, ensure_ascii=False, allow_nan=False)
    if lone := re.search("[\ud800-\udfff]", text):  # of a name that is not UTF-8
        raise CheckpointError(f"{path}: expected names in UTF-8 to write, got {lone[0]!r} in one")
    with replacing(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def _without_infinity(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _without_infinity(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_infinity(value) for value in content]
    return str(content) if isinstance(content, float) and math.isinf(content) else content


def read_tensors(path: Path) -> dict[str, Any]:
    """Return all tensors of a safetensors file. Raises CheckpointError if it is not readable."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    "The type as safetensors writes it, such as F32 or BF16."
    shape: tuple[int, ...]
    "The size of each dimension."


def tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """Return the type and shape of each tensor in a safetensors file, from its header.

    Raises CheckpointError if the file is not complete.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: TensorInfo(dtype=str(each.get_dtype()), shape=tuple(each.get_shape()))
            for name, each in slices.items()
        }


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
        with open_regular(path) as file:
            try:
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
