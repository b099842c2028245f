"""Keep a promise while an audit runs: choose thresholds by the bound, and test the promise.

Both read only what was seen before the token that they decide about, so the bounds of ``Audit``
stay valid: they hold for every way to choose thresholds that does not know the next coin.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from offramp.calibration.audit import Audit, check_loss
from offramp.calibration.promise import check_levels
from offramp.errors import ConfigError
from offramp.schema import fitting, shown

TIGHTEN = 0.9
"""Share of the budget from which on thresholds tighten."""
RELAX = 0.75
"""Share of the budget below which thresholds relax."""
_CAP = 0.9  # of the largest valid bet


@dataclass(kw_only=True)
class PromiseKeeper:
    """A position on a ladder of thresholds, so that the mean risk of all tokens keeps a promise.

    With probability 1 - delta of the audit, the sum of the conditional risks of the first T tokens
    is at most epsilon T + credit, for every T together: ``next_step`` is 0 wherever one more lost
    token could break that. Between these limits it moves one step at a time.
    """

    epsilon: float
    "The promise: the mean risk of all tokens, those that ran whole included, is at most this."
    steps: int
    "Largest position of the ladder, the boldest thresholds. 0 lets no token leave."
    credit: float = 0.0
    """Lost tokens that are allowed in advance. Without credit, about ``tokens_until_trust`` tokens
    run before many may leave."""
    step: int = 1
    "The position where nothing stands against it."
    moved_at: int = 0
    "Number of tokens at the last move."
    audited_at: int = 0
    "Number of audited tokens at the last move."

    def __post_init__(self) -> None:
        check_levels(epsilon=self.epsilon)
        if self.steps < 1 or not 0 <= self.step <= self.steps:
            raise ConfigError(
                f"steps: expected at least 1 and a step from 0 to {shown(self.steps)}, got "
                f"{shown(self.step)}"
            )
        if not 0 <= self.credit < math.inf:
            raise ConfigError(f"credit: expected a number from 0, got {shown(self.credit)}")
        if min(self.moved_at, self.audited_at) < 0:
            raise ConfigError(f"moved_at: expected a number from 0, got {shown(self.moved_at)}")

    def next_step(self, audit: Audit, *, pending: int = 0) -> int:
        """Return the position for the next token, from the audit of all tokens before it.

        ``pending`` is the number of tokens that were decided, but are not in the audit yet, such
        as those of other rows of a batch.
        """
        lost, allowed = audit.most_lost, self._allowed(audit, pending)
        waited = audit.tokens >= self.moved_at + 2 / audit.share
        if lost >= TIGHTEN * allowed and self.step and audit.audited > self.audited_at:
            self._move(-1, audit)
        elif lost < RELAX * allowed and self.step < self.steps and waited:
            self._move(1, audit)
        return self.position(audit, pending=pending)

    def position(self, audit: Audit, *, pending: int = 0) -> int:
        """Return the position for the next token as ``next_step`` does, without a move."""
        fits = audit.most_lost + pending + 1 <= self._allowed(audit, pending)
        return self.step if fits else 0

    def _allowed(self, audit: Audit, pending: int) -> float:
        return self.epsilon * (audit.tokens + pending + 1) + self.credit

    def _move(self, by: int, audit: Audit) -> None:
        self.step += by
        self.moved_at, self.audited_at = audit.tokens, audit.audited

    def state(self) -> dict[str, Any]:
        """Return the fields, which fit into JSON."""
        return asdict(self)

    @classmethod
    def load(cls, state: Any) -> "PromiseKeeper":
        """Return the keeper with this state. Raises ConfigError for any other content."""
        return fitting(cls, state)


def tokens_until_trust(epsilon: float, share: float, delta: float) -> int:
    """Return after how many tokens without a loss the bound, and not the count, limits exits."""
    return math.ceil(Audit(share=share, delta=delta).unseen / epsilon)


@dataclass(kw_only=True)
class PromiseTest:
    """A test martingale against the null that *every* conditional risk is at least epsilon.

    The bets are predictable and vary: they follow the mean and the variance of the losses so far
    (the approximate GRAPA of Waudby-Smith & Ramdas 2024, section 5.2). A small p-value says that
    some conditional risk was below epsilon, not that their mean is: use ``Audit`` for the mean.
    """

    epsilon: float
    observed: int = 0
    total: float = 0.0
    "Sum of the losses."
    squares: float = 0.0
    "Sum of the squared losses."
    log_wealth: float = 0.0
    most: float = 0.0
    "Largest logarithm of the wealth so far."

    def __post_init__(self) -> None:
        check_levels(epsilon=self.epsilon)
        if not 0 <= self.squares <= self.total <= self.observed:
            raise ConfigError(
                "promise test: expected 0 <= squares <= total <= observed, got "
                f"{shown(self.squares)}, {shown(self.total)} and {shown(self.observed)}"
            )
        if not (0 <= self.most < math.inf and -math.inf < self.log_wealth <= self.most):
            raise ConfigError(f"log_wealth: expected a finite number, got {shown(self.log_wealth)}")

    def observe(self, loss: float) -> None:
        """Take the loss of an audited token."""
        loss = check_loss(loss)
        self.log_wealth += math.log1p(self.bet * (self.epsilon - loss))
        self.most = max(self.most, self.log_wealth)
        self.observed += 1
        self.total = min(self.total + loss, float(self.observed))
        self.squares = min(self.squares + loss * loss, self.total)

    @property
    def bet(self) -> float:
        """The bet on the next loss, from those before it."""
        n = self.observed + 1
        mean = (self.epsilon / 2 + self.total) / n
        variance = max(0.0, (self.epsilon / 4 + self.squares) / n - mean * mean)
        edge = max(0.0, self.epsilon - mean)
        best = edge / (variance + edge * edge) if edge else 0.0
        return min(best, _CAP / (1.0 - self.epsilon))

    @property
    def p_value(self) -> float:
        """The p-value, valid whenever it is looked at."""
        return math.exp(-self.most)

    def state(self) -> dict[str, Any]:
        """Return the fields, which fit into JSON."""
        return asdict(self)

    @classmethod
    def load(cls, state: Any) -> "PromiseTest":
        """Return the test with this state. Raises ConfigError for any other content."""
        return fitting(cls, state)
