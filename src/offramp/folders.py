"""Claim an output folder, lock it, and write it completely or not at all.

A folder is locked while a process writes to it, so a second process that is given the same one
ends with a sentence. The system releases the lock when the process ends, however it ends.
"""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from offramp.errors import CheckpointError
from offramp.files import sync, write_json, writing

try:
    import fcntl
except ImportError:  # not on every platform
    fcntl = None  # type: ignore[assignment]


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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder.

    Raises CheckpointError if another process holds it. File systems without locks have none.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{folder}: expected a folder that no other process writes to, but one does; "
                    "wait until it has ended, or choose another folder"
                ) from None
            except OSError:
                pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Create a folder for a run, or use an empty one, and lock it.

    If the run fails while the folder is still empty, the folder is removed if it was created
    here. Raises CheckpointError as ``check_free`` and ``locked`` do.
    """
    check_free(out)
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made: {error.strerror}") from None
    with locked(out):
        check_free(out)  # another process may have been first
        try:
            yield
        except BaseException:
            with suppress(OSError):  # one that is not empty stays
                for path in made:
                    path.rmdir()
            raise


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Claim a new or empty folder, and yield a temporary folder beside it to write its files to.

    On success the files are synced, and the temporary folder is renamed to ``out``; otherwise
    nothing is left. A mount point, the working folder and a folder whose parent cannot be written
    to are not replaced: ``out`` itself is yielded, and emptied again on an error. Raises
    CheckpointError as ``claimed`` does, or if the folder cannot be written.
    """
    with claimed(out), writing(out):
        target = Path(os.path.realpath(out))
        stays = target.is_mount() or Path(os.path.realpath(os.curdir)).is_relative_to(target)
        if stays or not os.access(target.parent, os.W_OK):
            try:
                yield target
            except BaseException:
                for path in target.iterdir():
                    remove(path)
                raise
            return
        name = f".{target.name[:100]}.{socket.gethostname()[:100]}"
        remove_abandoned(target.parent, name)
        aside = target.with_name(f"{name}.{os.getpid()}.tmp")
        try:
            aside.mkdir()
            yield aside
            sync_tree(aside)
            aside.replace(target)
            sync(target.parent)
        finally:
            remove(aside)


def remove_abandoned(folder: Path, name: str) -> None:
    """Remove the temporary files and folders ``name.PID.tmp`` of processes that have ended."""
    for left in folder.iterdir():
        pid = left.name.removeprefix(f"{name}.").removesuffix(".tmp")
        if left.name == f"{name}.{pid}.tmp" and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            remove(left)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_temporary(*folders: Path) -> None:
    """Remove the temporary files and folders that a killed process left in locked folders."""
    for folder in folders:
        for path in folder.glob(".*"):
            if path.name.endswith(".tmp") or re.fullmatch(r"\.tmp\w{6}", path.name):  # safetensors'
                remove(path)


def sync_tree(folder: Path) -> None:
    """Wait until a folder and everything in it are on the disk."""
    for path in (*sorted(folder.rglob("*")), folder):
        if path.is_file() or path.is_dir():
            sync(path)


def claim_marked(marker: Path, content: Any) -> None:
    """Write ``content`` to ``marker``, in a new or empty folder that becomes this run's.

    Temporary files of ``marker`` that a killed process left behind are removed first.
    """
    for left in marker.parent.glob(f".{marker.name}.*.tmp"):
        left.unlink(missing_ok=True)
    with claimed(marker.parent):
        write_json(marker, content)
