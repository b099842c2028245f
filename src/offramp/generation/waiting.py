"""Rows that go deep wait for each other: rebatching (DREX, arXiv 2512.15705), with a bound.

A block reads its weights as soon as one row needs it, so a step in which two of eight rows go
beyond an exit pays for all blocks above it. Instead these two may wait at the exit, while the
others leave and run their next tokens, until enough rows are there to go on together. The numbers
of a token do not depend on when it runs, so only the time changes.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

SHARE = 0.5
"""Rows go on from an exit when so many of all rows that decode are there."""


class Waiting:
    """The tokens that wait at each exit.

    No token waits for more than ``bound`` steps, at all exits together, and none if it is 0. When
    one has waited so long, or no other row has a token to run, the tokens at all exits go on.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._states: dict[int, dict[int, Tensor]] = defaultdict(dict)  # by layer and row
        self._steps: dict[int, int] = {}  # steps that each row that waits has waited
        self._before: dict[int, int] = {}  # the same of rows that went on with their token
        self._all_go, self._enough = True, 0.0

    def __bool__(self) -> bool:
        return bool(self._steps)

    @property
    def rows(self) -> Collection[int]:
        """The rows whose tokens wait."""
        return self._steps.keys()

    def at(self, layer: int) -> bool:
        """Return whether a token waits at this exit."""
        return bool(self._states.get(layer))

    def begin(self, fresh: Sequence[int]) -> None:
        """Begin a step with the next tokens of the ``fresh`` rows."""
        if not self.bound:
            return
        for row in fresh:
            self._before.pop(row, None)
        self._all_go = not fresh or any(steps >= self.bound for steps in self._steps.values())
        self._enough = SHARE * (len(fresh) + len(self._steps))
        for row in self._steps:
            self._steps[row] += 1

    def meet(
        self, layer: int, h: Float[Tensor, "B 1 D"], rows: list[int]
    ) -> tuple[Float[Tensor, "N 1 D"], list[int]]:
        """Add rows that go deeper than an exit to those that wait there.

        Returns the states and rows (ascending) that go on now: all of them or none.
        """
        held = self._states[layer]
        go = self._all_go or len(rows) + len(held) >= self._enough
        if go and not held:
            return h, rows
        held |= zip(rows, h, strict=True)
        if not go:
            for row in rows:
                self._steps[row] = self._before.pop(row, 0) + 1
            return h[:0], []
        ordered = sorted(held)
        h = torch.stack([held[row] for row in ordered])
        for row in ordered:
            if row in self._steps:
                self._before[row] = self._steps.pop(row)
        held.clear()
        return h, ordered

    def forget(self, row: int) -> None:
        """Remove the token of a row whose text is over."""
        self._steps.pop(row, None)
        self._before.pop(row, None)
        for held in self._states.values():
            held.pop(row, None)
