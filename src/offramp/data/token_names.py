"""The token that a person names: an id, a text, or the vocabulary's own spelling."""

import re

from tokenizers import Tokenizer

from offramp.data.tokenizer import byte_characters, encode_prompt
from offramp.data.vocabulary import unknown_id
from offramp.errors import ConfigError, CorpusError

LITERAL = "text:"
"""What follows it is a text as it stands: neither an id nor an escape."""
_ESCAPE = re.compile(r"\\(?:([nrt0\\])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4}))")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "\\": "\\"}


def token_id(tokenizer: Tokenizer, written: str, vocab_size: int) -> int:
    r"""Return the id of a token as people write it.

    - Digits are an id: ``2`` is token 2. The token of the digit is ``text:2``.
    - Anything else is a text that is one token, such as `` and`` or ``<|im_end|>``, or the
      vocabulary's own spelling of it, such as ``Ġand`` or ``<0x0A>``.
    - ``\n``, ``\r``, ``\t``, ``\0``, ``\\``, ``\x1b`` and ``\u00e9`` are characters, except
      after ``text:``.

    Raises ConfigError for an id that the model does not have and for a text that is not one token.
    """
    if re.fullmatch("[0-9]+", written):
        if len(written) < 20 and int(written) < vocab_size:
            return int(written)
        raise ConfigError(
            f"stop_token: expected a token id from 0 to {vocab_size - 1}, got {written[:40]}; a "
            f"text of digits is written {LITERAL}{written[:40]}"
        )
    text = written.removeprefix(LITERAL)
    if text == written:
        text = _ESCAPE.sub(_character, written)
    found = _spelled(tokenizer, text) if text else None
    if found is None or found >= vocab_size:
        raise ConfigError(
            f"stop_token: expected a token of the model (an id, or a text that is one token), got "
            f"{written!r}"
        )
    return found


def _character(escape: re.Match[str]) -> str:
    named, *codes = escape.groups()
    return _ESCAPED[named] if named else chr(int(codes[0] or codes[1], 16))


def _spelled(tokenizer: Tokenizer, text: str) -> int | None:
    """Return the one token of a text, or else the token that the vocabulary spells like it."""
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        return None
    data = text.encode()
    byte_level, metaspace = "".join(byte_characters()[b] for b in data), text.replace(" ", "\u2581")
    for spelling in (text, byte_level, metaspace, f"<0x{data[0]:02X}>" if len(data) == 1 else text):
        id = tokenizer.token_to_id(spelling)
        if id is not None and _text(tokenizer, id) in (text, text.removeprefix(" ")):
            return int(id)
    try:
        ids = encode_prompt(tokenizer, text, special_tokens=False)
    except CorpusError:  # no unknown token, and no token of this text
        ids = []
    if len(ids) == 1 and ids[0] != unknown_id(tokenizer):
        return ids[0]
    id = tokenizer.token_to_id(text)
    if id is None or (len(text) == 1 and "\ufffd" in _text(tokenizer, id)):
        return (
            None  # a byte-level vocabulary spells each byte as a letter: that letter is not meant
        )
    return int(id)


def _text(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.decode([id], skip_special_tokens=False)
