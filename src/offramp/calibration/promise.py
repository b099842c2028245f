"""The guarantee of a certificate as a value. Imports neither PyTorch nor SciPy."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from offramp.errors import ConfigError

Risk = Literal["disagreement", "nll-gap"]
RISKS: tuple[str, ...] = get_args(Risk)

DEFAULT_BOUND = 1.0
"""Nats at which a token's NLL gap is clipped."""

Method = Literal["ltt", "crc"]
METHODS: tuple[str, ...] = get_args(Method)

DEFAULT_DELTA = 0.05


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A bound on a risk, and the probability with which it must hold."""

    risk: str = "disagreement"
    "disagreement (with the prediction of the last layer) or nll-gap (nats per token)."
    epsilon: float = 0.02
    "Upper bound on the risk: a share of the tokens, or nats per token."
    delta: float = DEFAULT_DELTA
    "Probability that the bound fails; not used by crc, which bounds the average risk."
    method: Method = "ltt"
    "ltt (Learn-then-Test) or crc (conformal risk control)."
    bound: float = DEFAULT_BOUND
    "Value at which the nll-gap of each token is clipped, in nats."

    def __post_init__(self) -> None:
        check_levels(epsilon=self.epsilon, delta=self.delta)
        if self.risk not in RISKS:
            raise ConfigError(f"risk: expected one of {', '.join(RISKS)}, got {self.risk!r}")
        if self.method not in METHODS:
            raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ConfigError(f"bound: expected a number of nats above 0, got {self.bound}")
        if not self.scaled_epsilon < 1:
            raise ConfigError(
                f"epsilon: expected less than the bound of {self.bound} nats, got {self.epsilon}"
            )

    @property
    def scale(self) -> float:
        """Factor that converts losses in [0, 1] to shares or nats."""
        return self.bound if self.risk == "nll-gap" else 1.0

    @property
    def scaled_epsilon(self) -> float:
        """Epsilon in the unit of losses in [0, 1]."""
        return self.epsilon / self.scale

    @property
    def sequences_needed(self) -> int:
        """Smallest number of sequences with which a threshold can be certified."""
        return sequences_needed(self.scaled_epsilon, self.delta if self.method == "ltt" else None)


def sequences_needed(epsilon: float, delta: float | None) -> int:
    """Return the smallest number of sequences, all without loss, that certify a threshold.

    For Learn-then-Test it is the least n with (1 - eps)^n <= delta; for conformal risk control,
    where delta is None, the least n with 1 / (n + 1) <= eps.
    """
    if delta is None:
        return max(1, math.ceil(1 / epsilon - 1 - 1e-9))
    n = max(1, math.ceil(math.log(delta) / math.log1p(-epsilon) - 1e-9))
    return n


def check_levels(**levels: float) -> None:
    """Raise a ConfigError for a level outside (0, 1)."""
    for name, value in levels.items():
        if not 0 < value < 1:
            raise ConfigError(f"{name}: expected a number between 0 and 1, got {value}")
