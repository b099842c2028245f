"""Ladders of exit rules: from one by which no token leaves to that of a text, never bolder.

A promise that is kept while decoding chooses a rung for each token
(calibration/keep_promise.py). On rung 0 no token leaves. On the last rung tokens leave by the
text's own rule. Each rung between needs about twice the confidence of the next one: a distance of
half as much to the score that is certain, or half the price of ``GainPolicy``.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.exit_rule import ExitRule

RUNGS = 6
"""Number of the last rung."""
LARGEST_NATS = 3.0
"""Predicted loss at which the rungs of ``gain`` begin, where a threshold allows more."""

Ladder = tuple[ExitRule | None, ...]
"""RUNGS + 1 rules, from careful to bold. The first one is None: no token leaves."""


def ladder_of(rule: ExitRule, num_exits: int) -> Ladder:
    """Return the rungs up to a rule, which is the last one itself."""
    policies = [careful(rule.policy, rule.confidence, rung, num_exits) for rung in range(1, RUNGS)]
    return (None, *(replace(rule, policy=policy) for policy in policies), rule)


def careful(
    policy: ThresholdPolicy | GainPolicy, confidence: str, rung: int, num_exits: int
) -> ThresholdPolicy | GainPolicy:
    """Return the policy of a rung from 1 to RUNGS - 1. No token leaves earlier by it."""
    if isinstance(policy, GainPolicy):
        return replace(policy, price=policy.price * 2.0 ** (rung - RUNGS))
    thresholds = [raised(each, confidence, rung, num_exits) for each in policy.thresholds]
    return replace(policy, thresholds=tuple(thresholds))


def raised(threshold: float, confidence: str, rung: int, num_exits: int) -> float:
    """Return the threshold of a rung from 1 to RUNGS - 1, which is at least ``threshold``."""
    if confidence == "patience":  # counts of exits, at most num_exits - 1
        lowest = max(1.0, threshold)
        return max(threshold, num_exits + (lowest - num_exits) * rung / RUNGS)
    certain, widest = (0.0, LARGEST_NATS) if confidence == "gain" else (1.0, 1.0)
    distance = min(widest, certain - threshold)
    return max(threshold, certain - distance * math.ldexp(1.0, rung - RUNGS))


class Ladders:
    """The ladder of each row whose text has a rule, and the rung of its next token.

    Not ``used``, there are none.
    """

    def __init__(self, num_exits: int, *, used: bool) -> None:
        self.num_exits, self.used = num_exits, used
        self._ladders: dict[int, Ladder] = {}
        self._rungs: dict[int, int] = {}

    def begin(self, row: int, rule: ExitRule | None) -> Ladder:
        """Return the ladder of a row whose text begins, on rung 0; () if it has none."""
        if rule is None or not self.used:
            return ()
        known = (each for each in self._ladders.values() if each[-1] is rule)
        ladder = self._ladders[row] = next(known, ()) or ladder_of(rule, self.num_exits)
        return ladder

    def climb(self, row: int, rung: int) -> ExitRule | None:
        """Give the next token of a row this rung, and return its rule; None without a ladder."""
        if row not in self._ladders:
            return None
        self._rungs[row] = rung
        return self._ladders[row][rung]

    def rungs(self, rows: Sequence[int]) -> list[int] | None:
        """Return the rung of each row; None if there are no ladders."""
        return [self._rungs.get(row, 0) for row in rows] if self.used else None

    def end(self, row: int) -> None:
        """Forget the ladder of a row, whose text is over."""
        self._ladders.pop(row, None)
        self._rungs.pop(row, None)
