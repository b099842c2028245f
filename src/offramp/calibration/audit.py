"""The running risk of tokens that left early, bounded at all times at once from audited ones.

An audit runs some of the tokens that left to the end, too, and compares. Each token that left is
audited with the same probability, ``share``, by a coin that does not depend on the outcome. The
bound holds at every moment together with probability 1 - delta, whatever the text, the thresholds
and their changes are: docs/guarantees.md states the theorem and its proof. No models here.
"""

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.promise import DEFAULT_DELTA, check_levels
from offramp.calibration.share import check_share
from offramp.errors import ConfigError
from offramp.schema import fitting, shown

Wealth = NDArray[np.float64]
"""(..., J) logarithms of wealth, one for each of ``BETS``."""

BETS: NDArray[np.float64] = np.array([0.98, 0.75, *(2.0**-k for k in range(1, 14))])
"""(J,) the fixed bets that are mixed: large ones for few losses, small ones for many tokens."""
_WEIGHTS = np.arange(2, len(BETS) + 2) ** -1.5
LOG_WEIGHTS: NDArray[np.float64] = np.log(_WEIGHTS / _WEIGHTS.sum())
_LARGEST_COUNT = 1 << 53
_ITERATIONS = 100


def log_factors(losses: Any, *, lower: bool = False) -> Wealth:
    """Return (..., J): what each audited loss in [0, 1] adds to the logarithm of each wealth.

    It is ln(1 - l X) for the upper bound, and ln(1 + l X) for the lower one.
    """
    signed = np.asarray(losses, dtype=np.float64)[..., None] * (1.0 if lower else -1.0)
    factors: Wealth = np.log1p(BETS * signed)
    return factors


def solve_sum(wealth: Wealth, delta: float) -> NDArray[np.float64]:
    """Return (...): the sum s at which sum_j w_j exp(l_j s + wealth_j) reaches 1 / delta.

    Newton's method for the logarithm of the sum, which is convex and increasing in s. It starts
    to the right of the solution, so no step passes it.
    """
    terms = wealth + LOG_WEIGHTS
    target = -math.log(delta)
    solution: NDArray[np.float64] = ((target - terms) / BETS).min(axis=-1)
    for _ in range(_ITERATIONS):
        exponents = terms + BETS * solution[..., None]
        peak = exponents.max(axis=-1)
        parts = np.exp(exponents - peak[..., None])
        total = parts.sum(axis=-1)
        step = (peak + np.log(total) - target) * total / (parts @ BETS)
        solution = solution - step
        if (step <= 1e-10 * (1.0 + np.abs(solution))).all():
            break
    return solution


@dataclass(kw_only=True)
class Audit:
    """What an audit has seen, and the bounds that follow. ``state`` is JSON; ``load`` reads it.

    Every token of the text is recorded once, before the next one is decided: by ``ran_whole``,
    ``left`` or ``audited_loss``. The bounds are wrong if a token that left is audited, or not
    recorded, because of its outcome.
    """

    share: float
    "Probability with which each token that leaves is audited, in (0, 1]."
    delta: float = DEFAULT_DELTA
    "Probability with which the upper bound may ever fail, and the same for the lower bound."
    tokens: int = 0
    "Number of tokens recorded."
    tokens_left: int = 0
    "Number of tokens that left early; the others have no loss."
    audited: int = 0
    "Number of tokens that left and were audited."
    lost: float = 0.0
    "Sum of the audited losses."
    wealth: list[float] = field(default_factory=lambda: [0.0] * len(BETS))
    "Sum of ``log_factors`` for the upper bound."
    wealth_lower: list[float] = field(default_factory=lambda: [0.0] * len(BETS))
    "Sum of ``log_factors`` for the lower bound."

    def __post_init__(self) -> None:
        check_share(self.share)
        check_levels(delta=self.delta)
        counts = (0, self.audited, self.tokens_left, self.tokens, _LARGEST_COUNT)
        if list(counts) != sorted(counts):
            raise ConfigError(
                "audit: expected 0 <= audited <= tokens_left <= tokens, got "
                f"{shown(self.audited)}, {shown(self.tokens_left)} and {shown(self.tokens)}"
            )
        if not 0 <= self.lost <= self.audited:
            raise ConfigError(f"lost: expected from 0 to {self.audited}, got {shown(self.lost)}")
        for name, low, high in (("wealth", -math.inf, 0.0), ("wealth_lower", 0.0, math.inf)):
            values = getattr(self, name)
            fits = all(math.isfinite(value) and low <= value <= high for value in values)
            if len(values) != len(BETS) or not fits:
                raise ConfigError(f"{name}: expected {len(BETS)} logarithms, got {shown(values)}")

    def ran_whole(self, tokens: int = 1) -> None:
        """Record tokens that ran through all layers, so that they have no loss."""
        self.tokens += check_count(tokens)

    def left(self, tokens: int = 1) -> None:
        """Record tokens that left early and were not audited."""
        self.tokens_left += check_count(tokens)
        self.tokens += tokens

    def audited_loss(self, loss: float) -> None:
        """Record a token that left early and was audited, with its loss in [0, 1]."""
        loss = check_loss(loss)
        self.left()
        self.audited += 1
        if loss == 0:
            return  # the wealth does not change
        self.lost = min(self.lost + loss, float(self.audited))
        self.wealth = (log_factors(loss) + self.wealth).tolist()
        self.wealth_lower = (log_factors(loss, lower=True) + self.wealth_lower).tolist()
        self.__dict__.pop("_sums", None)

    @cached_property
    def _sums(self) -> tuple[float, float]:
        """The bounds on the sum of losses, from below and above, as far as losses count."""
        both = solve_sum(np.array([self.wealth_lower, self.wealth]), self.delta)
        return max(0.0, -float(both[0])) / self.share, max(0.0, float(both[1])) / self.share

    @property
    def most_lost(self) -> float:
        """Upper bound on the sum of the risks of all tokens; one token has a risk of 1 at most."""
        return min(self._sums[1], float(self.tokens_left))

    @property
    def unseen(self) -> float:
        """Lost tokens that may hide, at most, while no audit has found a loss."""
        return float(solve_sum(np.zeros(len(BETS)), self.delta)) / self.share

    @property
    def upper(self) -> float:
        """Upper bound on the mean risk of all tokens so far, in [0, 1]; 0 before any left."""
        return self.most_lost / max(1, self.tokens)

    @property
    def upper_left(self) -> float:
        """Upper bound on the mean risk of the tokens that left; 1 before any left."""
        return self.most_lost / self.tokens_left if self.tokens_left else 1.0

    @property
    def lower_left(self) -> float:
        """Lower bound on the mean risk of the tokens that left; 0 before any left."""
        return min(1.0, self._sums[0] / self.tokens_left) if self.tokens_left else 0.0

    @property
    def estimate(self) -> float | None:
        """Mean of the audited losses; None before the first audit."""
        return self.lost / self.audited if self.audited else None

    def state(self) -> dict[str, Any]:
        """Return the fields, which fit into JSON."""
        return asdict(self)

    @classmethod
    def load(cls, state: Any) -> "Audit":
        """Return the audit with this state. Raises ConfigError for any other content."""
        return fitting(cls, state)


def check_loss(loss: float) -> float:
    """Return a loss. Raises ConfigError unless it is a number from 0 to 1."""
    if not 0 <= loss <= 1:
        raise ConfigError(f"loss: expected a number from 0 to 1, got {shown(loss)}")
    return float(loss)


def check_count(tokens: int) -> int:
    """Return a number of tokens. Raises ConfigError unless it is a whole number from 0."""
    if not isinstance(tokens, int) or not 0 <= tokens < _LARGEST_COUNT:
        raise ConfigError(f"tokens: expected a whole number from 0, got {shown(tokens)}")
    return tokens
