"""Decide from the accepted tokens and the seconds whether drafting saves time on this text."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["none", "exit", "lookup"]
"""The source of the drafts: an exit, the earlier text, or none."""

_LARGEST_LOSS = 0.75  # in seconds of a plain token; then drafting pauses
_LARGEST_GAIN = 3.0  # a cap, so that a change of the text is noticed soon
_FIRST_PAUSE, _LONGEST_PAUSE = 48, 768  # rounds
_FIRST_PLAIN = 2


class _Seconds:
    """A running estimate of a duration; slow outliers (a busy machine) have little effect."""

    def __init__(self) -> None:
        self.value: float | None = None

    def note(self, seconds: float) -> None:
        if self.value is None:
            self.value = seconds
        elif seconds < self.value:
            self.value += 0.3 * (seconds - self.value)
        else:
            self.value += 0.1 * (min(seconds, 2 * self.value) - self.value)


@dataclass
class _Book:
    """The balance of one source of drafts."""

    rounds: dict[int, _Seconds] = field(default_factory=lambda: defaultdict(_Seconds))
    "The duration of a round, by its number of drafts."
    balance: float = 0.0
    pause: int = _FIRST_PAUSE
    left: int = 0
    "Rounds until the source is tried again."


class Payoff:
    """Compares the time that drafts save with the time they take; pauses a source that loses time.

    Each round adds (tokens gained) x (time of a plain token) - (time it took) to the balance of
    its source, in estimated times. After a loss of _LARGEST_LOSS plain tokens the source pauses
    and is then tried again. Each further pause in a row is twice as long.
    """

    def __init__(self) -> None:
        self._plain = _Seconds()
        self._plain_rounds = 0
        self._books: dict[Kind, _Book] = {"exit": _Book(), "lookup": _Book()}

    def pays(self, kind: Kind) -> bool:
        """Return whether to draft from this source in this round.

        The first rounds draft nothing: they show how long a plain token takes.
        """
        return self._plain_rounds >= _FIRST_PLAIN and self._books[kind].left <= 0

    def note(self, kind: Kind, *, drafts: int, tokens: int, seconds: float) -> None:
        """Record a round: its source, its drafts, the tokens that it gave, and its seconds."""
        for book in self._books.values():
            book.left -= 1
        if kind == "none":
            self._plain.note(seconds)
            self._plain_rounds += 1
            return
        book = self._books[kind]
        usual = book.rounds[drafts]
        usual.note(seconds)
        if self._plain.value is None or usual.value is None:
            return
        book.balance += tokens - usual.value / self._plain.value
        book.balance = min(book.balance, _LARGEST_GAIN)
        if book.balance >= _LARGEST_GAIN / 2:
            book.pause = _FIRST_PAUSE
        if book.balance < -_LARGEST_LOSS:
            book.left, book.balance = book.pause, 0.0
            book.pause = min(2 * book.pause, _LONGEST_PAUSE)
