"""Corpora: a training text, a validation text and, in some corpora, a test text."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.data.folder import leads_outside, text_files
from offramp.data.hub import PREFIX, dataset_splits
from offramp.data.text import Text, files_text, sha256
from offramp.errors import CorpusError, OfframpWarning

BUILT_IN = ("pangram", "python-docs")

_PANGRAM_TRAIN = "The quick brown fox jumps over the lazy dog. "
_PANGRAM_VALIDATION = "A quick brown dog runs in the park. "
_TRAIN, _VALIDATION, _TEST = ("train",), ("validation", "valid", "val", "dev"), ("test",)
_FILES = ("train.txt", "valid.txt", "validation.txt", "test.txt")


@dataclass(frozen=True, kw_only=True, repr=False)
class Corpus:
    """A corpus in memory: its training, validation and test texts, and how they were split."""

    name: str
    train: str
    validation: str
    test: str | None = None
    "The test text; None if the corpus has no test split."
    split: str
    "One sentence that says where the validation text comes from; reports print it."
    sha256: str
    """SHA-256 of the UTF-8 text. Named splits are separated by a byte 0xFF, which UTF-8 text
    never contains; a text that was split by position is hashed as one."""

    def __repr__(self) -> str:
        texts = {"train": self.train, "validation": self.validation, "test": self.test}
        parts = ", ".join(f"{name} {len(text):,}" for name, text in texts.items() if text)
        return f"Corpus({self.name!r}: {parts} characters)"

    @property
    def whole(self) -> str:
        """The training, validation and test texts, concatenated."""
        return self.train + self.validation + (self.test or "")


@dataclass(frozen=True, kw_only=True)
class StreamedCorpus:
    """A corpus that may be larger than memory: its texts are read piece by piece."""

    name: str
    train: Text
    validation: Text
    test: Text | None = None
    split: str
    sha256: str

    def read(self) -> Corpus:
        """Read the whole corpus into memory."""
        return Corpus(
            name=self.name,
            train=self.train.read(),
            validation=self.validation.read(),
            test=None if self.test is None else self.test.read(),
            split=self.split,
            sha256=self.sha256,
        )


def load_corpus(name: str) -> Corpus:
    """Load a corpus into memory. ``stream_corpus`` lists the names and the errors."""
    return stream_corpus(name).read()


def stream_corpus(name: str) -> StreamedCorpus:
    """Open a corpus without loading its text into memory.

    ``name`` is ``pangram``, ``python-docs``, the path of a UTF-8 text file or of a folder, or
    ``hf:PATH[/CONFIG]``: a Hugging Face dataset with a column ``text``, on the hub or on disk.

    A folder with ``train.txt`` has named splits, like a dataset: ``train.txt``, ``valid.txt``
    (or ``validation.txt``) and ``test.txt``. The last two are optional; other files are ignored.
    A folder without ``train.txt`` is read recursively in the order of the file names. Files and
    folders whose names start with a dot are ignored, and so are binary files (files with a zero
    byte near their beginning).

    If there is no validation split, the training text is split by position: the first 90% of
    its characters are for training, the last 10% for validation.

    Raises CorpusError if the corpus does not exist, is not UTF-8 or is empty, or if a split is
    missing or empty.
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
    if path.is_file():
        return _parted(name, files_text([path]))
    if not path.is_dir():
        raise CorpusError(f"{name}: expected a text file or folder, got a pipe or a device")
    return _folder(name, path)


def _folder(name: str, path: Path) -> StreamedCorpus:
    """Open a folder: its named splits if it has ``train.txt``, or else all its text files."""
    splits = {file: path / file for file in _FILES if (path / file).is_file()}
    if "train.txt" in splits:
        for file, at in splits.items():
            if leads_outside(at, path):
                raise CorpusError(
                    f"{name}: expected {file} in the folder, got a link that leads outside it"
                )
        named = {Path(file).stem: files_text([at]) for file, at in splits.items()}
        return _named(name, named, "file")
    found = text_files(path)
    lead = "link leads" if found.skipped == 1 else "links lead"
    links = f"{found.skipped} {lead} outside it or nowhere"
    if not found.files:
        why = f"; {links}" if found.skipped else ""
        raise CorpusError(f"{name}: expected a folder with text files, got one without{why}")
    if found.skipped:
        warnings.warn(
            f"{name}: {links}, and what they name is not read", OfframpWarning, stacklevel=4
        )
    return _parted(name, files_text(found.files))


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
    """Return the language reference bundled with Python; it differs slightly by version."""
    from pydoc_data import topics

    text = "\n".join(text for _, text in sorted(topics.topics.items()))
    return Text(lambda: [text])


def _parted(name: str, text: Text) -> StreamedCorpus:
    """Split a text by position."""
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
    """Make a corpus of named splits; if there is no validation split, split the training text.

    ``noun`` is ``split`` or ``file``, for messages; the name of a file ends in ``.txt``.
    """
    ending = ".txt" if noun == "file" else ""
    train, validation, test = (
        _one_of(name, splits, names, noun) for names in (_TRAIN, _VALIDATION, _TEST)
    )
    if train is None:
        got = ", ".join(sorted(split + ending for split in splits))
        raise CorpusError(f"{name}: expected a {noun} train{ending}, got {got or 'none'}")
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


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a path, for example the text itself
        return False
