"""Tokens on disk: a text is tokenised once, and later read through memory maps."""

import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from offramp.data.text import sha256
from offramp.data.tokenizer import encode_pieces
from offramp.data.vocabulary import unknown_id
from offramp.errors import ConfigError, CorpusError, OfframpWarning
from offramp.files import file_sha256, reason, sync

FORMAT = 2
SHARD_TOKENS = 1 << 25
_ABOUT = "about.json"
_ABANDONED_SECONDS = 24 * 3600


class TokenShards:
    """The token ids of a text, in memory-mapped files of one folder.

    Every file is compared with its hash when the folder is opened. Raises CorpusError if the
    folder is incomplete, damaged or changed.
    """

    def __init__(self, folder: Path, *, verified: bool = False) -> None:
        self.folder: Path | None = folder
        try:
            self.about: dict[str, Any] = _read_about(folder / _ABOUT)
            lengths, dtype = self.about["lengths"], np.dtype(self.about["dtype"])
            self.unknown_tokens = int(self.about["unknown_tokens"])
            hashes = [None] * len(lengths) if verified else self.about["shards_sha256"]
            self._shards = [
                _open(folder / _shard(i), length, dtype, sha256)
                for i, (length, sha256) in enumerate(zip(lengths, hashes, strict=True))
            ]
        except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorpusError(f"{folder}: expected whole token shards, got: {error}") from None
        self._starts = np.cumsum([0, *lengths])

    @classmethod
    def of(cls, shards: list[NDArray[Any]], unknown_tokens: int) -> "TokenShards":
        """Return tokens that are kept in memory, without a folder."""
        made = cls.__new__(cls)
        made.folder, made.about = None, {}
        made._shards, made.unknown_tokens = shards, unknown_tokens
        made._starts = np.cumsum([0, *map(len, shards)])
        return made

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Int[Tensor, " N"]:
        """Return the tokens from ``start`` to ``stop``; the range is clipped to the text."""
        start, stop = (min(max(at, 0), len(self)) for at in (start, stop))
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = [np.empty(0, np.int64)]
        for shard, begins in zip(self._shards[first:], self._starts[first:], strict=False):
            if begins >= stop:
                break
            parts.append(shard[max(start - begins, 0) : stop - begins].astype(np.int64))
        return torch.from_numpy(np.concatenate(parts))

    def __reduce__(self) -> tuple[Callable[..., "TokenShards"], tuple[Any, ...]]:
        if self.folder is None:
            return TokenShards.of, (self._shards, self.unknown_tokens)
        return _verified, (self.folder,)  # another process maps the files itself


def _verified(folder: Path) -> TokenShards:
    return TokenShards(folder, verified=True)


def tokenise(
    text: str | Iterable[str],
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    on_tokens: Callable[[int], None] | None = None,
) -> TokenShards:
    """Return the tokens of a text from ``cache_dir``; if they are not there, make and store them.

    The folder's name is a hash of the text and the tokenizer. The folder appears only when it is
    complete; one that is damaged or changed is replaced. At most one shard is in memory. A text
    in pieces is read twice, for its hash and for its tokens. ``on_tokens`` is called with the
    number of tokens done so far.

    If the folder cannot be written, a warning says so, and all tokens are kept in memory. Raises
    CorpusError if the text changes between the two reads.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens: expected at least 1, got {shard_tokens}")
    if isinstance(text, Iterator):
        raise ConfigError(
            f"text: expected a str or pieces that can be read twice, got a {type(text).__name__}"
        )
    pieces: Iterable[str] = [text] if isinstance(text, str) else text
    hashes = {
        "text_sha256": sha256(pieces),
        "tokenizer_sha256": sha256([tokenizer.to_str()]),
    }
    folder = cache_dir / sha256([f"{FORMAT} {json.dumps(hashes)}"])[:32]
    kept = _kept(folder, hashes)
    if kept is not None:
        return kept
    aside: Path | None = None
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache_dir)
        aside = cache_dir / f".{folder.name}.{uuid.uuid4().hex}.tmp"
        aside.mkdir()
        _write(pieces, tokenizer, aside, hashes, shard_tokens, on_tokens)
        return _publish(aside, folder, hashes)
    except OSError as error:
        warnings.warn(
            f"{cache_dir}: tokens cannot be stored there ({reason(error)}), so they are kept in "
            "memory",
            OfframpWarning,
            stacklevel=2,
        )
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return _in_memory(pieces, tokenizer, hashes, shard_tokens)


def _kept(folder: Path, hashes: dict[str, str]) -> TokenShards | None:
    """Return the tokens in a folder if they are whole and those of this text and tokenizer."""
    with suppress(CorpusError):
        kept = TokenShards(folder)
        if hashes.items() <= kept.about.items():
            return kept
    return None


def _shard(index: int) -> str:
    return f"{index:05d}.npy"


def _read_about(path: Path) -> dict[str, Any]:
    """Read the description of a folder. Raises ValueError unless its own hash is right."""
    about = json.loads(_regular(path).read_text(encoding="utf-8"))
    if not isinstance(about, dict) or about.pop("sha256", None) != _digest(about):
        raise ValueError(f"{path.name} without its hash, or changed")
    return about


def _regular(path: Path) -> Path:
    if not path.is_file():  # reading from a pipe would not end
        raise ValueError(f"{path.name}: no file")
    return path


def _digest(about: dict[str, Any]) -> str:
    return sha256([json.dumps(about, sort_keys=True)])


def _open(path: Path, length: int, dtype: np.dtype[Any], expected: str | None) -> NDArray[Any]:
    if expected is not None and file_sha256(_regular(path)) != expected:
        raise ValueError(f"{path.name}: other content than was written")
    shard: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if shard.shape != (length,) or shard.dtype != dtype:
        raise ValueError(
            f"{path.name}: {shard.dtype} of shape {shard.shape}, not {dtype} of ({length},)"
        )
    return shard


def _write(
    pieces: Iterable[str],
    tokenizer: Tokenizer,
    folder: Path,
    hashes: dict[str, str],
    shard_tokens: int,
    on_tokens: Callable[[int], None] | None,
) -> None:
    dtype = _dtype(tokenizer)
    unknown = unknown_id(tokenizer)
    lengths: list[int] = []
    shards_sha256: list[str] = []
    done = unknown_tokens = 0
    for ids in _whole_shards(
        encode_pieces(tokenizer, _unchanged(pieces, hashes)), dtype, shard_tokens
    ):
        with _synced(folder / _shard(len(lengths))) as file:
            np.save(file, ids, allow_pickle=False)
        lengths.append(len(ids))
        shards_sha256.append(file_sha256(folder / _shard(len(shards_sha256))))
        done += len(ids)
        unknown_tokens += 0 if unknown is None else int((ids == unknown).sum())
        if on_tokens:
            on_tokens(done)
    about = {
        "format": FORMAT,
        **hashes,
        "dtype": dtype.name,
        "lengths": lengths,
        "shards_sha256": shards_sha256,
        "unknown_tokens": unknown_tokens,
    }
    with _synced(folder / _ABOUT) as file:
        file.write(json.dumps({**about, "sha256": _digest(about)}, indent=2).encode("utf-8"))


def _in_memory(
    pieces: Iterable[str], tokenizer: Tokenizer, hashes: dict[str, str], shard_tokens: int
) -> TokenShards:
    unknown = unknown_id(tokenizer)
    encoded = encode_pieces(tokenizer, _unchanged(pieces, hashes))
    shards = [ids.copy() for ids in _whole_shards(encoded, _dtype(tokenizer), shard_tokens)]
    return TokenShards.of(
        shards, 0 if unknown is None else sum(int((ids == unknown).sum()) for ids in shards)
    )


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    largest = max(tokenizer.get_vocab().values(), default=0)
    return np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)


def _unchanged(pieces: Iterable[str], hashes: dict[str, str]) -> Iterator[str]:
    """Yield the pieces of a text; raises CorpusError at its end if it is not the text hashed."""
    hashed = hashlib.sha256()
    for piece in pieces:
        hashed.update(piece.encode("utf-8"))
        yield piece
    if hashed.hexdigest() != hashes["text_sha256"]:
        raise CorpusError(
            "corpus: expected a text that does not change, but it changed while it was read"
        )


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _whole_shards(
    parts: Iterable[NDArray[np.int64]], dtype: np.dtype[Any], shard_tokens: int
) -> Iterator[NDArray[Any]]:
    """Yield the ids in arrays of ``shard_tokens``; the last array may be shorter."""
    shard, filled = np.empty(shard_tokens, dtype), 0
    for part in parts:
        at = 0
        while at < len(part):
            taken = part[at : at + shard_tokens - filled]
            shard[filled : filled + len(taken)] = taken
            at, filled = at + len(taken), filled + len(taken)
            if filled == shard_tokens:
                yield shard
                filled = 0
    if filled:
        yield shard[:filled]


def _publish(aside: Path, folder: Path, hashes: dict[str, str]) -> TokenShards:
    """Rename the new folder, unless another process has made the same folder in the meantime."""
    while True:
        try:
            sync(aside)
            aside.rename(folder)
            sync(folder.parent)
        except OSError:
            if not folder.exists():
                raise
            if (kept := _kept(folder, hashes)) is not None:
                return kept
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()  # damaged
        else:
            return TokenShards(folder, verified=True)


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove temporary folders of killed processes: those without a new shard for a day."""
    for aside in cache_dir.glob(".*.tmp"):
        with suppress(OSError):  # removed in the meantime
            if time.time() - aside.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(aside)
