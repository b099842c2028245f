"""Claim an output folder, lock it, and write it completely or not at all.

A folder is locked while a process writes to it, so a second process that is given the same one
ends with a sentence. The system releases the lock when the process ends, however it ends.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from offramp.errors import CheckpointError
from offramp.files import remove, sync, temporary_folder, write_json, writing

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
    out = Path(os.path.realpath(out))  # mkdir would make "new" for new/..
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
        with temporary_folder(target) as aside:
            yield aside
            sync_tree(aside)
            aside.replace(target)
            sync(target.parent)


def remove_temporary(*folders: Path) -> None:
    """Remove the temporary files and folders that a killed process left in locked folders."""
    for folder in folders:
        for path in folder.glob(".*"):
            if path.name.endswith(".tmp"):
                remove(path)


def sync_tree(folder: Path) -> None:
    """Wait until a folder and everything in it are on the disk."""
    for path in (*sorted(folder.rglob("*")), folder):
        if path.is_file() or path.is_dir():
            sync(path)


@contextmanager
def working_in(marker: Path, content: Any) -> Iterator[None]:
    """Hold the lock of a folder of work that can be continued.

    ``marker`` is the file that says which work it is; if it is not there, the folder, which must
    be new or empty, becomes that work's. If the work fails before anything else is in the folder,
    the folder is removed again. Temporary files that a killed process left behind are removed.
    """
    out = marker.parent
    existed = out.exists()
    if not marker.exists():
        if out.is_dir():
            with locked(out):
                remove_temporary(out)
        with new_folder(out) as folder:
            write_json(folder / marker.name, content)
    with locked(out):
        remove_temporary(out)
        try:
            yield
        except BaseException:
            if all(path == marker or path.is_dir() for path in out.rglob("*")):
                for path in out.iterdir() if existed else (out,):
                    remove(path)
            raise
