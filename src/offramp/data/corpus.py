"""Corpora: a text to train on, one to validate on, and one to test on where there is one."""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.data.hub import PREFIX, dataset_splits
from offramp.data.text import Text, files_text, sha256
from offramp.errors import CorpusError

BUILT_IN = ("pangram", "python-docs")

_PANGRAM_TRAIN = "The quick brown fox jumps over the lazy dog. "
_PANGRAM_VALIDATION = "A quick brown dog runs in the park. "
_TRAIN, _VALIDATION, _TEST = ("train",), ("validation", "valid", "val", "dev"), ("test",)
_BEGINNING = 8000  # bytes
_FILES = ("train.txt", "valid.txt", "validation.txt", "test.txt")


@dataclass(frozen=True, kw_only=True, repr=False)
class Corpus:
    """A text to train on, a text to validate on, and how the two were parted."""

    name: str
    train: str
    validation: str
    test: str | None = None
    "Only a corpus with named splits has one."
    split: str
    "One sentence: where the validation text comes from. It belongs beside every figure."
    sha256: str
    """Hash of the text, UTF-8: of all of it where it was parted by position; between named
    splits stands a byte 0xFF, which no UTF-8 text holds."""

    def __repr__(self) -> str:
        texts = {"train": self.train, "validation": self.validation, "test": self.test}
        parts = ", ".join(f"{name} {len(text):,}" for name, text in texts.items() if text)
        return f"Corpus({self.name!r}: {parts} characters)"

    @property
    def whole(self) -> str:
        """All the text: train, validation and test."""
        return self.train + self.validation + (self.test or "")


@dataclass(frozen=True, kw_only=True)
class StreamedCorpus:
    """A ``Corpus`` that may be larger than memory: its texts are read piece by piece."""

    name: str
    train: Text
    validation: Text
    test: Text | None = None
    split: str
    sha256: str

    def read(self) -> Corpus:
        """The same corpus, in memory."""
        return Corpus(
            name=self.name,
            train=self.train.read(),
            validation=self.validation.read(),
            test=None if self.test is None else self.test.read(),
            split=self.split,
            sha256=self.sha256,
        )


def load_corpus(name: str) -> Corpus:
    """Load a corpus into memory; ``stream_corpus`` says which there are."""
    return stream_corpus(name).read()


def stream_corpus(name: str) -> StreamedCorpus:
    """Open a corpus without holding its text.

    ``pangram``, ``python-docs``, the path of a UTF-8 text file or of a folder, or
    ``hf:PATH[/CONFIG]``: a Hugging Face dataset with a column ``text``, on the hub or on disk.

    A folder with ``train.txt`` has named splits, as a dataset has: ``train.txt``, ``valid.txt``
    (or ``validation.txt``) and ``test.txt``, of which the last two may be missing; its other
    files are left out.
    Without a validation split the training text is parted by position: the first 90% of its
    characters train, the last 10% validate. So is every other corpus. A folder without such
    files is read in the order of their names, its subfolders included; files and folders whose
    names start with a dot are left out, and so are binary files: those with a zero byte near
    their beginning.

    Raises CorpusError: no such corpus, not UTF-8, empty, or a split that is missing or empty.
    """
    if not name.strip():
        raise CorpusError("corpus: expected a name or a path, got an empty one")
    if name == "pangram":
        return _pangram()
    if name == "python-docs":
        return _parted(name, _python_docs())
    if name.startswith(PREFIX):
        return _named(name, dataset_splits(name), "split")
    path = Path(name)
    if not _exists(path):
        raise CorpusError(
            f"{name}: expected {', '.join(BUILT_IN)}, {PREFIX}DATASET, or the path of a text "
            "file or folder; there is no such path"
        )
    if not path.is_dir():
        return _parted(name, files_text([path]))
    splits = {file: path / file for file in _FILES if (path / file).is_file()}
    if "train.txt" in splits:
        named = {Path(file).stem: files_text([at]) for file, at in splits.items()}
        return _named(name, named, "file")
    return _parted(name, files_text(_files_in(path)))


def _pangram() -> StreamedCorpus:
    train = (_PANGRAM_TRAIN * (100_000 // len(_PANGRAM_TRAIN) + 1))[:100_000]
    validation = (_PANGRAM_VALIDATION * (10_000 // len(_PANGRAM_VALIDATION) + 1))[:10_000]
    return StreamedCorpus(
        name="pangram",
        train=Text(lambda: [train]),
        validation=Text(lambda: [validation]),
        split="two sentences, one repeated to 100,000 characters for training, "
        "the other to 10,000 for validation",
        sha256=sha256([train, validation]),
    )


def _python_docs() -> Text:
    """The language reference that every Python carries; it differs a little by version."""
    from pydoc_data import topics

    text = "\n".join(text for _, text in sorted(topics.topics.items()))
    return Text(lambda: [text])


def _parted(name: str, text: Text) -> StreamedCorpus:
    """Part a text by position."""
    if text.is_blank():
        raise CorpusError(f"{name}: expected text, got an empty corpus")
    whole = text.scan()
    cut = whole.characters * 9 // 10
    return StreamedCorpus(
        name=name,
        train=text.part(0, cut),
        validation=text.part(cut),
        split="the first 90% of the characters train, the last 10% validate",
        sha256=whole.sha256,
    )


def _named(name: str, splits: Mapping[str, Text], noun: str) -> StreamedCorpus:
    """A corpus of named splits; one without validation has its training text parted.

    ``noun``: what a split is, ``split`` or ``file`` (then ``.txt`` ends its name).
    """
    ending = ".txt" if noun == "file" else ""
    train, validation, test = (
        _one_of(name, splits, names, noun) for names in (_TRAIN, _VALIDATION, _TEST)
    )
    if train is None:
        got = ", ".join(sorted(split + ending for split in splits))
        raise CorpusError(
            f"{name}: expected a {noun} train{ending} beside the others, got {got or 'none'}"
        )
    texts = [splits[split] for split in (train, validation, test) if split is not None]
    for split in (train, validation, test):
        if split is not None and splits[split].is_blank():
            raise CorpusError(f"{name}: expected text in the {noun} {split}{ending}, got none")
    text, rest = splits[train], None
    if validation is None:
        cut = text.scan().characters * 9 // 10
        text, rest = text.part(0, cut), text.part(cut)
        sentence = (
            f"the first 90% of the characters of the {noun} {train}{ending} train, "
            "the last 10% validate"
        )
    else:
        rest = splits[validation]
        sentence = f"the {noun} {train}{ending} trains, {validation}{ending} validates"
    if test is not None:
        sentence += f", {test}{ending} is kept for testing"
    return StreamedCorpus(
        name=name,
        train=text,
        validation=rest,
        test=None if test is None else splits[test],
        split=sentence,
        sha256=sha256(*texts),
    )


def _one_of(name: str, splits: Mapping[str, Text], names: Sequence[str], noun: str) -> str | None:
    found = [split for split in names if split in splits]
    if len(found) > 1:
        raise CorpusError(f"{name}: expected one {noun} of {' and '.join(found)}, got both")
    return found[0] if found else None


def _files_in(path: Path) -> list[Path]:
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not _is_binary(file)
    ]
    if not files:
        raise CorpusError(f"{path}: expected a folder with text files, got one without")
    return files


def _is_binary(path: Path) -> bool:
    """Whether a zero byte stands near the beginning: how git tells; but UTF-16 is text."""
    try:
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING)
    except OSError:
        return False  # whoever reads it says why it cannot be read
    return b"\0" in beginning and not beginning.startswith(
        (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for a path, as when the text itself is given
        return False
