"""Corpora, their tokens, and the windows that a model reads.

A corpus is text; a tokenizer (Hugging Face ``tokenizers``) makes ids of it; ids are read in
contiguous windows, each token predicted from those before it in its window.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from offramp.errors import CorpusError

UNKNOWN = "<unk>"
BUILT_IN = ("pangram", "python-docs")
_ENCODE_CHARACTERS = 4096  # characters as tokens: a text may be cut anywhere

_PANGRAM_TRAIN = "The quick brown fox jumps over the lazy dog. "
_PANGRAM_VALIDATION = "A quick brown dog runs in the park. "


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text to train on, a text to validate on, and how the two were parted."""

    name: str
    train: str
    validation: str
    split: str
    "One sentence: where the validation text comes from."
    sha256: str
    "Hash of the whole text: train and validation, UTF-8."

    @property
    def whole(self) -> str:
        """All the text."""
        return self.train + self.validation


def load_corpus(name: str) -> Corpus:
    """Load ``pangram``, ``python-docs``, or a UTF-8 text file or a folder of them.

    A corpus without named splits is parted by position: the first 90% of its characters
    train, the last 10% validate. A folder's files are read in the order of their names, its
    subfolders included; files and folders whose names start with a dot are left out.
    """
    if name == "pangram":
        train = (_PANGRAM_TRAIN * (100_000 // len(_PANGRAM_TRAIN) + 1))[:100_000]
        validation = (_PANGRAM_VALIDATION * (10_000 // len(_PANGRAM_VALIDATION) + 1))[:10_000]
        return Corpus(
            name=name,
            train=train,
            validation=validation,
            split="two sentences, one repeated to 100,000 characters for training, "
            "the other to 10,000 for validation",
            sha256=_sha256(train + validation),
        )
    text = _python_docs() if name == "python-docs" else _read_path(Path(name))
    if not text.strip():
        raise CorpusError(f"{name}: expected text, got an empty corpus")
    cut = len(text) * 9 // 10
    return Corpus(
        name=name,
        train=text[:cut],
        validation=text[cut:],
        split="the first 90% of the characters train, the last 10% validate",
        sha256=_sha256(text),
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _python_docs() -> str:
    """The language reference that every Python carries; it differs a little by version."""
    from pydoc_data import topics

    return "\n".join(text for _, text in sorted(topics.topics.items()))


def _read_path(path: Path) -> str:
    if _exists(path) and path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise CorpusError(f"{path}: expected a folder with text files, got an empty one")
        return "\n".join(_read_file(file) for file in files)
    if not _exists(path):
        raise CorpusError(
            f"{path}: expected {', '.join(BUILT_IN)}, or the path of a text file or folder; "
            "there is no such path"
        )
    return _read_file(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a path, as when the text itself is given
        return False


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}: expected UTF-8 text, got a byte that is not UTF-8 at offset {error.start}"
        ) from None
    except OSError as error:
        raise CorpusError(f"{path}: expected a readable file, got: {error.strerror}") from None


def character_tokenizer(text: str) -> Tokenizer:
    """One token a character of ``text``, and ``<unk>`` for every other character."""
    characters = [UNKNOWN, *sorted(set(text))]
    vocabulary = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")  # m: also \n
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Int[Tensor, " N"]:
    """Token ids of a text."""
    starts = range(0, len(text), _ENCODE_CHARACTERS)
    parts = tokenizer.encode_batch_fast([text[i : i + _ENCODE_CHARACTERS] for i in starts])
    ids = [np.asarray(part.ids, np.int64) for part in parts]
    return torch.from_numpy(np.concatenate(ids) if ids else np.empty(0, np.int64))


def count_unknown(tokenizer: Tokenizer, ids: Int[Tensor, " N"]) -> int:
    """How many of these tokens are ``<unk>``."""
    unknown = tokenizer.token_to_id(UNKNOWN)
    return 0 if unknown is None else int(torch.eq(ids, unknown).sum())


def batches(
    ids: Int[Tensor, " N"],
    *,
    seq_len: int,
    batch_size: int,
    drop_last: bool = False,
    order: torch.Generator | None = None,
) -> Iterator[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]]:
    """Yield (inputs, targets) of contiguous, not overlapping windows.

    The windows come as they stand in the text, or in a random order drawn from ``order``.

    Every token but the first is a target once. With ``drop_last`` incomplete windows and
    incomplete batches are left out, as in the seed document's protocol; otherwise they come
    last, each of its own shape.
    """
    predictions = len(ids) - 1
    whole = max(predictions, 0) // seq_len
    inputs = ids[: whole * seq_len].view(whole, seq_len)
    targets = ids[1 : whole * seq_len + 1].view(whole, seq_len)
    end = whole // batch_size * batch_size if drop_last else whole
    rows = torch.arange(whole) if order is None else torch.randperm(whole, generator=order)
    for start in range(0, end, batch_size):
        chosen = rows[start : min(start + batch_size, end)]
        yield inputs[chosen], targets[chosen]
    if not drop_last and predictions > whole * seq_len:
        rest = ids[whole * seq_len :]
        yield rest[None, :-1], rest[None, 1:]
