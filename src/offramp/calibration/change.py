"""Notice that the risk of audited tokens has changed: an e-detector.

Shin, Ramdas and Rinaldo (2024, "E-detectors: a nonparametric framework for sequential change
detection"): a sum of e-processes that begin at every moment, R_t = (R_{t-1} + 1) e_t. While every
conditional risk is between ``low`` and ``high``, the expected number of audited tokens until R
reaches ``run_length`` is at least ``run_length``.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.audit import Audit, check_loss
from offramp.errors import ConfigError
from offramp.schema import fitting, shown

RUN_LENGTH = 5000
"""Expected number of audited tokens until a false alarm, at least."""
LEARNED = 200
"""Audited tokens whose losses give the range that later ones are compared with."""
FRACTIONS: NDArray[np.float64] = np.array([0.64, 0.32, 0.16, 0.08, 0.04, 0.02])
"""(J,) bets, as fractions of the largest valid one."""


def e_values(loss: Any, low: float, high: float) -> NDArray[np.float64]:
    """Return (..., 2 J): what each statistic is multiplied by at losses in [0, 1].

    The first J are large if risks are above ``high``, the others if they are below ``low``.
    """
    loss = np.asarray(loss, dtype=np.float64)[..., None]
    above = 1.0 + FRACTIONS / high * (loss - high)
    below = 1.0 + FRACTIONS / (1.0 - low) * (low - loss)
    return np.concatenate([above, below], axis=-1)


@dataclass(kw_only=True)
class ChangeDetector:
    """Says when the risk of audited tokens leaves a range. ``state`` is JSON; ``load`` reads it."""

    high: float
    "The alarm is about conditional risks above this, such as a promise or an upper bound."
    low: float = 0.0
    "The alarm is also about conditional risks below this; 0 for none."
    run_length: float = RUN_LENGTH
    "Expected number of audited tokens until a false alarm, at least."
    statistics: list[float] = field(default_factory=lambda: [0.0] * (2 * len(FRACTIONS)))
    "The statistic of each bet since the last alarm."

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < 1 or self.high == 0:
            raise ConfigError(
                "change: expected 0 <= low <= high < 1 and high above 0, got "
                f"{shown(self.low)} and {shown(self.high)}"
            )
        if not 1 < self.run_length < math.inf:
            raise ConfigError(f"run_length: expected more than 1, got {shown(self.run_length)}")
        fits = all(0 <= value < math.inf for value in self.statistics)
        if len(self.statistics) != 2 * len(FRACTIONS) or not fits:
            raise ConfigError(f"statistics: expected numbers from 0, got {shown(self.statistics)}")

    def observe(self, loss: float) -> bool:
        """Take the loss of an audited token; return whether it raises the alarm.

        The statistics start again after an alarm.
        """
        factors = e_values(check_loss(loss), self.low, self.high)
        found = (np.array(self.statistics) + 1.0) * factors
        used = found if self.low else found[: len(FRACTIONS)]
        if used.mean() >= self.run_length:
            self.statistics = [0.0] * len(found)
            return True
        self.statistics = found.tolist()
        return False

    def state(self) -> dict[str, Any]:
        """Return the fields, which fit into JSON."""
        return asdict(self)

    @classmethod
    def load(cls, state: Any) -> "ChangeDetector":
        """Return the detector with this state. Raises ConfigError for any other content."""
        return fitting(cls, state)


@dataclass(kw_only=True)
class RiskWatch:
    """Learns in what range the risk of audited tokens is, and says when later ones leave it.

    The range holds the mean risk of the first ``LEARNED`` audited tokens: it is the bounds of an
    ``Audit`` of them, and is fixed before the tokens that it judges. After an alarm a new range is
    learned.
    """

    first: Audit = field(default_factory=lambda: Audit(share=1.0))
    "The audited tokens that give the range."
    detector: ChangeDetector | None = None
    "Compares the later ones; None while the range is learned."
    alarms: int = 0
    "Number of alarms."
    last_alarm: int | None = None
    "Number of tokens, audited or not, at the last alarm."

    def __post_init__(self) -> None:
        late = -1 if self.last_alarm is None else self.last_alarm
        if self.alarms < 0 or (self.alarms > 0) != (late >= 0):
            raise ConfigError(
                "alarms: expected a number, and last_alarm only with one, got "
                f"{shown(self.alarms)} and {shown(self.last_alarm)}"
            )
        if self.first.share != 1 or self.first.audited != self.first.tokens:
            raise ConfigError("first: expected audited tokens only, got others too")

    def observe(self, loss: float, *, tokens: int) -> bool:
        """Take the loss of an audited token, the last of ``tokens``; return whether it alarms."""
        if self.detector is None:
            self.first.audited_loss(loss)
            if self.first.audited >= LEARNED:
                low, high = self.first.lower_left, self.first.upper_left
                self.detector = ChangeDetector(low=low, high=min(high, 0.999))
            return False
        if not self.detector.observe(loss):
            return False
        self.alarms, self.last_alarm = self.alarms + 1, tokens
        self.learn()
        return True

    def learn(self) -> None:
        """Learn a new range from the next audited tokens."""
        self.first, self.detector = Audit(share=1.0), None

    def state(self) -> dict[str, Any]:
        """Return the fields, which fit into JSON."""
        return asdict(self)
