"""The text files of a corpus that is a folder, and where its links lead."""

import codecs
from dataclasses import dataclass, field
from pathlib import Path

from offramp.errors import CorpusError

_BEGINNING = 8000  # bytes


@dataclass(frozen=True, kw_only=True)
class FolderFiles:
    """The files of a folder in the order of their names, each file once."""

    files: tuple[Path, ...]
    skipped: int
    "Number of links that lead outside the folder, or nowhere."


def text_files(folder: Path) -> FolderFiles:
    """Find the text files in a folder and its subfolders.

    Each file is read once. A link to a file or folder inside ``folder`` adds what has not been
    found under its own name, as what is in a folder whose name starts with a dot; a link that
    leads outside, or nowhere, is skipped. Names that start with a dot, binary files, pipes and
    devices are ignored. Raises CorpusError if a folder cannot be read.
    """
    walk = _Walk(folder)
    walk.enter(folder)
    while walk.links:
        walk.follow(walk.links.pop(0))
    ordered = sorted(walk.files.values(), key=lambda path: path.relative_to(folder).parts)
    found = tuple(path for path in ordered if not _is_binary(path))
    return FolderFiles(files=found, skipped=walk.skipped)


def leads_outside(path: Path, folder: Path) -> bool:
    """Return whether a path is a link that leads out of a folder, or nowhere."""
    return path.is_symlink() and _inside(path, folder.resolve()) is None


@dataclass
class _Walk:
    folder: Path
    files: dict[Path, Path] = field(default_factory=dict)
    "By the real path of each file: the path by which it was found."
    folders: set[Path] = field(default_factory=set)
    links: list[Path] = field(default_factory=list)
    skipped: int = 0

    def __post_init__(self) -> None:
        self.root = self.folder.resolve()

    def enter(self, folder: Path) -> None:
        """Find the files below a folder, and its links, without following them."""
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            real = here.resolve()
            if real in self.folders:
                continue
            self.folders.add(real)
            try:
                paths = sorted(here.iterdir())
            except OSError as error:
                raise CorpusError(
                    f"{here}: expected a readable folder, got: {error.strerror}"
                ) from None
            for path in paths:
                if path.name.startswith("."):
                    continue
                if path.is_symlink():
                    self.links.append(path)
                elif path.is_dir():
                    waiting.append(path)
                elif path.is_file():
                    self.files[path.resolve()] = path

    def follow(self, link: Path) -> None:
        """Add what a link inside the folder names, unless it was found already."""
        target = _inside(link, self.root)
        if target is None:
            self.skipped += 1
        elif target.is_dir():
            self.enter(link)
        elif target.is_file():
            self.files.setdefault(target, link)


def _inside(link: Path, root: Path) -> Path | None:
    """Return where a link leads, if that is below ``root``."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return None
    return target if target.is_relative_to(root) else None


def _is_binary(path: Path) -> bool:
    """Return whether there is a zero byte near the beginning (git's rule) and no UTF-16 mark."""
    try:
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING)
    except OSError:
        return False  # reading the file raises the error
    return b"\0" in beginning and not beginning.startswith(
        (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    )
