"""Decide from the accepted tokens and the seconds whether drafts pay on a text, and how many."""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

Kind = Literal["none", "exit", "lookup"]
"""The source of the drafts: an exit, the earlier text, or none."""

_LARGEST_LOSS = 0.75  # in seconds of a plain token; then drafting pauses
_LARGEST_GAIN = 3.0  # a cap, so that a change of the text is noticed soon
_FIRST_PAUSE, _LONGEST_PAUSE = 48, 768  # rounds
_FIRST_PLAIN = 2
_MOST_BOOKS = 16  # options of drafts whose balance is remembered
_MEMORY = 0.9  # what a round counts after each later one, for how often drafts are accepted


class _Seconds:
    """A running estimate of a duration; slow outliers (a busy machine) have little effect.

    The first time may be slow, too, because something is prepared: the second replaces it.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self.times = 0

    def note(self, seconds: float) -> None:
        self.times += 1
        if self.value is None:
            self.value = seconds
        elif self.times == 2:
            self.value = min(self.value, seconds)
        elif seconds < self.value:
            self.value += 0.3 * (seconds - self.value)
        else:
            self.value += 0.1 * (min(seconds, 2 * self.value) - self.value)


@dataclass
class _Book:
    """The balance of one source of drafts."""

    balance: float = 0.0
    pause: int = _FIRST_PAUSE
    left: int = 0
    "Rounds until the source is tried again."
    first: list[float] = field(default_factory=lambda: [2.0, 2.0])
    "How many first drafts of a round were rejected and accepted, old ones counted less; a guess."
    later: list[float] = field(default_factory=lambda: [1.0, 4.0])
    "The same of drafts that follow an accepted one."

    def learn(self, drafts: int, accepted: int) -> None:
        """Note how many drafts of a round were accepted."""
        for counts, of, kept in (
            (self.first, min(drafts, 1), min(accepted, 1)),
            (self.later, max(0, drafts - 1) if accepted else 0, max(0, accepted - 1)),
        ):
            if of:
                counts[0] = _MEMORY * counts[0] + (kept < of)
                counts[1] = _MEMORY * counts[1] + kept


class Experience:
    """What earlier texts of a model have shown of its drafts.

    How long rounds take, by the source of their drafts and their number; and the balance of the
    drafts of exits. How often these are accepted depends on the model and on their options, too,
    not only on the text, so their pause goes on from one text to the next.
    """

    def __init__(self) -> None:
        self.plain = _Seconds()
        self.plain_rounds = 0
        self.of_rounds: dict[tuple[Kind, int], _Seconds] = defaultdict(_Seconds)
        self.cost_of_draft: dict[Kind, float] = {}
        "What a draft adds to a round, in plain tokens: a running mean."
        self._exit_books: dict[Hashable, _Book] = {}

    def exit_book(self, drafts: Hashable) -> _Book:
        """Return the balance of an exit's drafts with these options."""
        book = self._exit_books.pop(drafts, None) or _Book()
        self._exit_books[drafts] = book
        if len(self._exit_books) > _MOST_BOOKS:
            self._exit_books.pop(next(iter(self._exit_books)), None)
        return book

    def note(self, kind: Kind, drafts: int, seconds: float) -> None:
        """Record how long a round took."""
        if kind == "none":
            self.plain.note(seconds)
            self.plain_rounds += 1
            return
        self.of_rounds[kind, drafts].note(seconds)
        if self.plain.value and drafts:
            added = min(max(0.0, seconds / self.plain.value - 1) / drafts, 1.0)
            before = self.cost_of_draft.get(kind, added)
            self.cost_of_draft[kind] = before + 0.2 * (added - before)


_OF_MODELS: "WeakKeyDictionary[Any, Experience]" = WeakKeyDictionary()


def experience_of(model: Any) -> Experience:
    """Return the experience that all texts of a model share."""
    return _OF_MODELS.setdefault(model, Experience())


class Payoff:
    """Compares the time that drafts save with the time they take; pauses a source that loses time.

    Each round adds (tokens gained) x (time of a plain token) - (time it took) to the balance of
    its source, in estimated times. After a loss of _LARGEST_LOSS plain tokens the source pauses
    and is then tried again. Each further pause in a row is twice as long. The balance of prompt
    lookup belongs to the text, that of the exit to the model.

    A round has as many drafts as pay: where a call of several tokens takes much longer than one of
    a single token, as with 4-bit weights, drafts that are often rejected are few.
    """

    def __init__(self, experience: Experience | None = None, *, drafts: Hashable = None) -> None:
        """``drafts`` are the options of the exit's drafts."""
        self._experience = Experience() if experience is None else experience
        self._books: dict[Kind, _Book] = {
            "exit": self._experience.exit_book(drafts),
            "lookup": _Book(),
        }

    def pays(self, kind: Kind) -> bool:
        """Return whether to draft from this source in this round.

        The first rounds of a model draft nothing: they show how long a plain token takes.
        """
        return self._experience.plain_rounds >= _FIRST_PLAIN and self._books[kind].left <= 0

    def drafts(self, kind: Kind, most: int) -> int:
        """Return how many drafts, from 1 to ``most``, give the most tokens in a second.

        Drafts are taken to be accepted as often as those before them; ``most`` if no round has
        shown yet how long they take.
        """
        book, cost = self._books[kind], self._experience.cost_of_draft.get(kind)
        if cost is None:
            return most
        chance, later = (kept / (lost + kept) for lost, kept in (book.first, book.later))
        best, best_rate, tokens = 1, 0.0, 1.0
        for drafts in range(1, most + 1):
            tokens += chance
            chance *= later
            rate = tokens / (1 + cost * drafts)
            if rate > best_rate:
                best, best_rate = drafts, rate
        return best

    def note(self, kind: Kind, *, drafts: int, tokens: int, seconds: float) -> None:
        """Record a round: its source, its drafts, the tokens that it gave, and its seconds."""
        for book in self._books.values():
            book.left -= 1
        self._experience.note(kind, drafts, seconds)
        if kind == "none":
            return
        book, plain = self._books[kind], self._experience.plain.value
        book.learn(drafts, tokens - 1)
        usual = self._experience.of_rounds[kind, drafts]
        if plain is None or usual.value is None or usual.times < 2:
            return
        book.balance += tokens - usual.value / plain
        book.balance = min(book.balance, _LARGEST_GAIN)
        if book.balance >= _LARGEST_GAIN / 2:
            book.pause = _FIRST_PAUSE
        if book.balance < -_LARGEST_LOSS:
            book.left, book.balance = book.pause, 0.0
            book.pause = min(2 * book.pause, _LONGEST_PAUSE)
