"""The guarantee of a certificate as a value. Imports neither PyTorch nor SciPy."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from offramp.calibration.bets import needed_without_loss
from offramp.errors import ConfigError

Risk = Literal["disagreement", "nll-gap"]
RISKS: tuple[str, ...] = get_args(Risk)

GeneratedRisk = Literal["divergence", "rouge-l", "nll-gap"]
GENERATED_RISKS: tuple[str, ...] = get_args(GeneratedRisk)

On = Literal["text", "generation"]

DEFAULT_BOUND = 1.0
"""Nats at which a token's NLL gap is clipped."""

Method = Literal["ltt", "crc"]
METHODS: tuple[str, ...] = get_args(Method)

Test = Literal["auto", "betting", "empirical-bernstein", "hoeffding-bentkus"]
TESTS: tuple[str, ...] = get_args(Test)

DEFAULT_DELTA = 0.05


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A bound on a risk, and the probability with which it must hold."""

    on: On = "text"
    "The text that is covered: a given text, or generation, which the model writes itself."
    risk: str = ""
    """On a text disagreement (with the prediction of the last layer; the default) or nll-gap (nats
    per token). On generation divergence (share of a text from the first token on that differs from
    full depth's; the default), rouge-l (1 - ROUGE-L) or nll-gap (of the text, by the full
    model)."""
    epsilon: float = 0.02
    "Upper bound on the risk: a share of the tokens, or nats per token."
    delta: float = DEFAULT_DELTA
    "Probability that the bound fails; not used by crc, which bounds the average risk."
    method: Method = "ltt"
    "ltt (Learn-then-Test) or crc (conformal risk control)."
    bound: float = DEFAULT_BOUND
    "Value at which the nll-gap of each token is clipped, in nats."
    test: Test = "auto"
    """Test of ltt: betting, empirical-bernstein, hoeffding-bentkus, or auto, which is betting
    wherever there are enough sequences for it."""

    def __post_init__(self) -> None:
        check_levels(epsilon=self.epsilon, delta=self.delta)
        if self.on not in get_args(On):
            raise ConfigError(f"on: expected text or generation, got {self.on!r}")
        risks = GENERATED_RISKS if self.on == "generation" else RISKS
        if not self.risk:
            object.__setattr__(self, "risk", risks[0])
        if self.risk not in risks:
            raise ConfigError(
                f"risk: expected one of {', '.join(risks)} on {self.on}, got {self.risk!r}"
            )
        if self.method not in METHODS:
            raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.test not in TESTS:
            raise ConfigError(f"test: expected one of {', '.join(TESTS)}, got {self.test!r}")
        if self.method == "crc" and self.test != "auto":
            raise ConfigError(f"test: expected none with crc, which needs none, got {self.test}")
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
        delta = self.delta if self.method == "ltt" else None
        return sequences_needed(self.scaled_epsilon, delta, test=self.test)

    def test_for(self, n: int) -> str:
        """Return the test for this number of sequences: ``test``, or what auto chooses."""
        if self.test != "auto":
            return self.test
        return choose_test(n, self.scaled_epsilon, self.delta)


def sequences_needed(epsilon: float, delta: float | None, *, test: str = "auto") -> int:
    """Return the smallest number of sequences, all without loss, that certify a threshold.

    For Learn-then-Test with Hoeffding-Bentkus, which auto uses for few sequences, it is the least
    n with (1 - eps)^n <= delta; the other tests need a few more. For conformal risk control,
    where delta is None, it is the least n with 1 / (n + 1) <= eps.
    """
    if delta is None:
        return max(1, math.ceil(1 / epsilon - 1 - 1e-9))
    if test in ("betting", "empirical-bernstein"):
        return needed_without_loss(epsilon, delta, bernstein=test == "empirical-bernstein")
    return max(1, math.ceil(math.log(delta) / math.log1p(-epsilon) - 1e-9))


def choose_test(n: int, epsilon: float, delta: float) -> str:
    """Return the test that is best by what is known before any loss is seen.

    Losses are shares, such as the part of a sequence's tokens that is lost. The best test for them
    is betting, unless there are too few sequences for betting to certify anything.
    """
    enough = n >= sequences_needed(epsilon, delta, test="betting")
    return "betting" if enough else "hoeffding-bentkus"


def check_levels(**levels: float) -> None:
    """Raise a ConfigError for a level outside (0, 1)."""
    for name, value in levels.items():
        if not 0 < value < 1:
            raise ConfigError(f"{name}: expected a number between 0 and 1, got {value}")
