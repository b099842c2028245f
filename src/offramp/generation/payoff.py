"""Whether drafting pays on this text, from what was accepted and what it took."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["none", "exit", "lookup"]
"""What drafted: an exit, the text before, or nothing."""

_LOST_AT_MOST = 0.75  # in times of a plain token, before drafting stops
_GAIN_KEPT_AT_MOST = 3.0  # so that a change of text is noticed soon
_FIRST_PAUSE, _LONGEST_PAUSE = 48, 768  # rounds
_FIRST_PLAIN = 2


class _Seconds:
    """A duration as it usually is: slow outliers (a busy machine) move it little."""

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
    """Of one kind of draft."""

    rounds: dict[int, _Seconds] = field(default_factory=lambda: defaultdict(_Seconds))
    "By number of drafts."
    balance: float = 0.0
    pause: int = _FIRST_PAUSE
    left: int = 0
    "Rounds until the next chance."


class Payoff:
    """Weighs what drafts save against what they take; pauses a kind of them where it loses.

    Each round is booked as (tokens gained) x (time of a plain token) - (time it took), all in
    usual times. After a loss of _LOST_AT_MOST plain tokens that kind of draft pauses, for twice
    as long each time in a row, and then gets another chance.
    """

    def __init__(self) -> None:
        self._plain = _Seconds()
        self._plain_rounds = 0
        self._books: dict[Kind, _Book] = {"exit": _Book(), "lookup": _Book()}

    def pays(self, kind: Kind) -> bool:
        """Draft so in this round. The first tokens are plain: they tell what a plain one takes."""
        return self._plain_rounds >= _FIRST_PLAIN and self._books[kind].left <= 0

    def note(self, kind: Kind, *, drafts: int, tokens: int, seconds: float) -> None:
        """A round that took this long and gave this many tokens."""
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
        book.balance = min(book.balance, _GAIN_KEPT_AT_MOST)
        if book.balance >= _GAIN_KEPT_AT_MOST / 2:
            book.pause = _FIRST_PAUSE
        if book.balance < -_LOST_AT_MOST:
            book.left, book.balance = book.pause, 0.0
            book.pause = min(2 * book.pause, _LONGEST_PAUSE)
