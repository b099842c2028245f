"""Whether drafting pays on this text, from what was accepted and what it took."""

_LOST_AT_MOST = 1.5  # in times of a plain token, before drafting stops
_GAIN_KEPT_AT_MOST = 3.0  # so that a change of text is noticed soon
_FIRST_PAUSE, _LONGEST_PAUSE = 48, 768  # tokens


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


class Payoff:
    """Weighs what drafts save against what they take; pauses drafting where it loses.

    Each round is booked as (tokens gained) x (time of a plain token) - (time it took), all in
    usual times. After a loss of _LOST_AT_MOST plain tokens drafting pauses, for twice as long
    each time in a row, and then gets another chance.
    """

    def __init__(self) -> None:
        self._plain = _Seconds()
        self._rounds: dict[int, _Seconds] = {}  # by number of drafts
        self._balance = 0.0
        self._pause, self._left = _FIRST_PAUSE, 2  # the first tokens tell what a plain one takes

    @property
    def drafting(self) -> bool:
        """Draft in the next round."""
        return self._left <= 0

    def note(self, *, drafts: int | None, tokens: int, seconds: float) -> None:
        """A round that took this long and gave this many tokens; ``drafts`` None: a plain one."""
        if drafts is None:
            self._plain.note(seconds)
            self._left -= 1
            return
        usual = self._rounds.setdefault(drafts, _Seconds())
        usual.note(seconds)
        if self._plain.value is None or usual.value is None:
            return
        self._balance += tokens - usual.value / self._plain.value
        self._balance = min(self._balance, _GAIN_KEPT_AT_MOST)
        if self._balance >= _GAIN_KEPT_AT_MOST / 2:
            self._pause = _FIRST_PAUSE
        if self._balance < -_LOST_AT_MOST:
            self._left, self._balance = self._pause, 0.0
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
