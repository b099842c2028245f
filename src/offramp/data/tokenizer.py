"""Make or load tokenizers, and encode texts of any length."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from offramp.data.hub import hub_reachable, offline, one_line
from offramp.data.tokenizer_errors import failing, is_failure, silent, try_out
from offramp.errors import CheckpointError, ConfigError, CorpusError
from offramp.files import replacing
from offramp.reading import read_bytes
from offramp.schema import shown

UNKNOWN = "<unk>"
TOKENIZER_FILE = "tokenizer.json"
_BYTES = 256
_MOST_TOKENS = 1 << 20  # of bpe:N; the library reserves memory for all of them
_TOKENIZER_BYTES = 1 << 30
_ENCODES = "tokenizer: expected one that can encode this text"
_CUT_AFTER = 1 << 14  # characters
_CUT_BEFORE = 1 << 18
_CUT = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= \S))")
_AT_ONCE = 64  # pieces
_LONGEST_WORD = 1024  # characters of a word in the training of BPE
_LONG_RUN = re.compile(rf"\S{{{_LONGEST_WORD},}}|\s{{{_LONGEST_WORD},}}")  # may hold such words


def make_tokenizer(spec: str, text: str | Iterable[str]) -> Tokenizer:
    """Return the tokenizer that ``spec`` names; ``text`` is the training text, or its pieces.

    - ``characters``: one token per character of the text, and ``<unk>`` for all others.
    - ``bytes``: one token per UTF-8 byte, with the byte's value as its id.
    - ``bpe:N``: byte-level BPE with N tokens, trained on the text (Sennrich et al. 2016; Radford
      et al. 2019). Words of more than 1,024 characters are cut for the training.
    - The path of a ``tokenizer.json``, or of a folder that contains one.
    - Any other string: the name of a model on the Hugging Face hub that has a tokenizer.

    Raises ConfigError for an N out of range, and CorpusError for a tokenizer that cannot be
    loaded.
    """
    if spec == "characters":
        return character_tokenizer(text)
    if spec == "bytes":
        return byte_tokenizer()
    if spec.startswith("bpe:"):
        return train_bpe(_bpe_tokens(spec), text)
    return _stored_tokenizer(spec)


def character_tokenizer(text: str | Iterable[str]) -> Tokenizer:
    """Return a tokenizer with one token per character of ``text``, and ``<unk>`` for others."""
    characters: set[str] = set()
    for piece in _pieces(text):
        characters.update(piece)
    ordered = [UNKNOWN, *sorted(characters)]
    vocabulary = {character: index for index, character in enumerate(ordered)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")  # m: also \n
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per UTF-8 byte, with the byte's value as its id."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(tokens: int, text: str | Iterable[str]) -> Tokenizer:
    """Train byte-level BPE with this many tokens on a text. The result is deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        initial_alphabet=byte_characters(),
        special_tokens=[],
        show_progress=False,
    )
    pieces = (part for piece in cut_apart(text) for part in _short_words(piece))
    _stoppable(lambda: tokenizer.train_from_iterator(pieces, trainer))
    if (got := tokenizer.get_vocab_size()) < tokens:
        raise ConfigError(
            f"tokenizer: expected a training text with enough words for bpe:{tokens}, "
            f"got one for at most bpe:{got}"
        )
    return tokenizer


def _short_words(piece: str) -> Iterator[str]:
    """Cut a piece inside words of more than ``_LONGEST_WORD`` characters, and nowhere else.

    The time of training grows with the square of a word's length.
    """
    at, words = 0, pre_tokenizers.ByteLevel(add_prefix_space=False)
    for run in _LONG_RUN.finditer(piece):
        for _, (start, stop) in words.pre_tokenize_str(run[0]):
            for cut in range(start + _LONGEST_WORD, stop, _LONGEST_WORD):
                yield piece[at : run.start() + cut]
                at = run.start() + cut
    yield piece[at:]


def _stoppable(work: Callable[[], None]) -> None:
    """Do work of a library that answers no signals in a thread, so that Ctrl-C ends the wait."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]


def _bpe_tokens(spec: str) -> int:
    number = spec.removeprefix("bpe:")
    known = number.isascii() and number.isdigit() and len(number) < 20
    if not (known and _BYTES < int(number) <= _MOST_TOKENS):
        raise ConfigError(
            f"tokenizer: expected bpe:N with N at least {_BYTES + 1} and at most {_MOST_TOKENS}, "
            f"got {shown(spec)}"
        )
    return int(number)


def _stored_tokenizer(spec: str) -> Tokenizer:
    path = Path(spec)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    expected = f"characters, bytes, bpe:N, or the path of a {TOKENIZER_FILE} or a folder with one"
    try:
        if path.is_file():
            stored = read_bytes(path, at_most=_TOKENIZER_BYTES)
            with silent():
                tokenizer = Tokenizer.from_buffer(stored)
        elif Path(spec).exists() or spec.endswith(".json") or spec.startswith((".", "/", "~")):
            raise CorpusError(f"tokenizer {spec}: expected {expected}; there is no such file")
        else:
            reachable = hub_reachable()
            expected += ", or the name of a model on the Hugging Face hub"
            with nullcontext() if reachable else offline():
                tokenizer = Tokenizer.from_pretrained(spec)
    except CheckpointError as error:  # of the file
        raise CorpusError(f"tokenizer {error}") from None
    except CorpusError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        if path.is_file():
            message = (
                f"expected a {TOKENIZER_FILE} of the tokenizers library, got: {one_line(error)}"
            )
        elif reachable:
            message = f"expected {expected}, got: {one_line(error)}"
        else:
            message = (
                f"expected {expected}; the hub cannot be reached, and no tokenizer of this name "
                "is on this machine"
            )
        raise CorpusError(f"tokenizer {spec}: {message}") from None
    tokenizer.no_truncation()  # a stored tokenizer may truncate and pad; texts must stay whole
    tokenizer.no_padding()
    try_out(tokenizer, spec)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json``, completely or not at all. Raises CheckpointError if it fails."""
    with replacing(folder / TOKENIZER_FILE) as aside:
        aside.write_text(tokenizer.to_str(pretty=True), encoding="utf-8", newline="\n")


def encode(tokenizer: Tokenizer, text: str) -> Int[Tensor, " N"]:
    """Return the token ids of a text, without special tokens before or after it.

    The ids are the same as for the text in one piece (see ``cut_apart``), in linear time.
    """
    ids = list(encode_pieces(tokenizer, text))
    return torch.from_numpy(np.concatenate(ids) if ids else np.empty(0, np.int64))


def encode_pieces(tokenizer: Tokenizer, text: str | Iterable[str]) -> Iterator[NDArray[np.int64]]:
    """Yield the ids of ``encode`` part by part, for texts that may be larger than memory.

    Raises CorpusError if the tokenizer fails, as one without an unknown token may.
    """
    pieces = iter(cut_apart(text))
    while some := list(islice(pieces, _AT_ONCE)):
        with failing(_ENCODES):
            batch = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        for encoded in batch:
            yield np.asarray(encoded.ids, np.int64)


def encode_prompt(tokenizer: Tokenizer, text: str, *, special_tokens: bool = True) -> list[int]:
    """Return the token ids of a short text, by default with the special tokens around it.

    Raises CorpusError if the tokenizer fails, as one without an unknown token may.
    """
    with failing(_ENCODES):
        return list(tokenizer.encode(text, add_special_tokens=special_tokens).ids)


def cut_apart(text: str | Iterable[str]) -> Iterator[str]:
    """Cut a text at token boundaries, about every 16,384 characters.

    A cut is after a single line break or before a single space, between other characters. Byte-
    level BPE, WordPiece and SentencePiece all split words there; ``characters`` and ``bytes``
    split everywhere. (A tokenizer that adds a prefix to every text, such as Llama 2's space,
    adds it after each cut.) If there is no such place in 262,144 characters, the text is cut
    there. The cuts depend only on the text, not on how it was divided into pieces.
    """
    held, size = [], 0
    enough = _CUT_BEFORE + 2  # the last possible cut, and one character after it
    for piece in _pieces(text):
        held.append(piece)
        size += len(piece)
        if size < enough:
            continue
        joined, at = "".join(held), 0
        while len(joined) - at >= enough:
            cut = _next_cut(joined, at)
            yield joined[at:cut]
            at = cut
        held, size = [joined[at:]], len(joined) - at
    joined, at = "".join(held), 0
    while at < len(joined):
        cut = _next_cut(joined, at)
        yield joined[at:cut]
        at = cut


def _next_cut(text: str, at: int) -> int:
    found = _CUT.search(text, at + _CUT_AFTER, at + _CUT_BEFORE + 2)
    return found.end() if found else min(at + _CUT_BEFORE, len(text))


def first_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that the tokenizer's post-processor puts before every text, such as BOS."""
    try:
        ids = tokenizer.encode("a", add_special_tokens=True)
        plain = tokenizer.encode("a", add_special_tokens=False)
    except Exception:  # the library raises plain Exception: it has no token for this letter
        return ()
    if not len(plain):
        return ()
    return tuple(
        islice(ids.ids, next((i for i, m in enumerate(ids.special_tokens_mask) if not m), 0))
    )


def _pieces(text: str | Iterable[str]) -> Iterable[str]:
    return [text] if isinstance(text, str) else text


def byte_characters() -> list[str]:
    """Return the character that byte-level tokenizers use for each byte (Radford et al. 2019)."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(_BYTES, 2 * _BYTES))
    return [chr(byte if byte in own else next(others)) for byte in range(_BYTES)]
