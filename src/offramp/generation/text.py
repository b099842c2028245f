"""The text of tokens as they come, and where a stop string ends it."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_PART = "\ufffd"  # what a decoder puts for bytes that are no whole character yet


class TextStream:
    """Turns tokens into text piece by piece; the pieces together are the text.

    A piece may lag behind: bytes wait for the rest of their character, and what may be the
    beginning of a stop string waits until it is one or not.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.stopped = False
        self._ids: list[int] = []
        self._start = 0  # of the tokens whose text depends on each other
        self._read = 0  # tokens whose text is out of the tokenizer
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        if self.tokenizer is None or self.stopped:
            return ""
        self._ids.append(token)
        before = self.tokenizer.decode(self._ids[self._start : self._read])
        text = self.tokenizer.decode(self._ids[self._start :])
        if text.endswith(_PART) and len(self._ids) - self._read < 8:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(text[len(before) :])

    def flush(self) -> str:
        """What was held back, at the end."""
        if self.tokenizer is None or self.stopped:
            return ""
        before = self.tokenizer.decode(self._ids[self._start : self._read])
        rest = self.tokenizer.decode(self._ids[self._start :])[len(before) :]
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
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
