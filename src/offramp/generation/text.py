"""Convert tokens to text as they are generated, and end the text at a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from offramp.data.tokenizer_errors import decode

_PART = "\ufffd"  # a tokenizer returns it for an incomplete character


class TextStream:
    """Converts tokens to text piece by piece; the joined pieces are the text.

    A piece may come with a later token: bytes wait for the rest of their character, and text that
    may be the beginning of a stop string waits until this is decided.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.stopped = False
        self._ids: list[int] = []
        self._start = 0  # first of the tokens whose text depends on each other
        self._read = 0  # number of tokens whose text was taken from the tokenizer
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now."""
        if self.tokenizer is None or self.stopped:
            return ""
        self._ids.append(token)
        before = decode(self.tokenizer, self._ids[self._start : self._read])
        text = decode(self.tokenizer, self._ids[self._start :])
        if text.endswith(_PART) and len(self._ids) - self._read < 8:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(text[len(before) :])

    def flush(self) -> str:
        """Return the text that was held back; call it at the end."""
        if self.tokenizer is None or self.stopped:
            return ""
        before = decode(self.tokenizer, self._ids[self._start : self._read])
        rest = decode(self.tokenizer, self._ids[self._start :])[len(before) :]
        self._start = self._read = len(self._ids)
        out = self._release(rest) + ("" if self.stopped else self._held)
        self._held = ""
        return out

    def _release(self, text: str) -> str:
        text = self._held + text
        ends = [place for stop in self.stop_strings if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        hold = max((_overlap(text, stop) for stop in self.stop_strings), default=0)
        cut = len(text) - hold
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
