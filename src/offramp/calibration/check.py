"""Check a certificate on new text, as often as one likes: sequential tests by betting.

Sequences are read in the order of the text. Each of the two tests is a mean of wealths over fixed
bets. Its wealth is not expected to grow while its hypothesis is true, so by Ville's inequality the
largest wealth so far gives a p-value that holds at all times together (Waudby-Smith & Ramdas 2024;
docs/guarantees.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from offramp.calibration.bounds import Losses, check_losses
from offramp.calibration.certificate import Certificate
from offramp.calibration.promise import DEFAULT_DELTA, check_levels
from offramp.calibration.risk import sequence_losses, whole_sequences
from offramp.evaluation.cost import ModelCost
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import ExitTrace

Verdict = Literal["broken", "holds", "undecided"]
BETS_ABOVE = {0.9: 0.2, 0.5: 0.2, 0.25: 0.15, 0.12: 0.15, 0.06: 0.1, 0.03: 0.1, 0.01: 0.1}
"""Weights of the bets that a risk is above a value, by fraction of the largest bet."""
BETS_BELOW = {0.99: 0.5, 0.75: 0.15, 0.5: 0.1, 0.25: 0.1, 0.1: 0.1, 0.03: 0.05}
"""Weights of the bets that a risk is below a value."""
_SMALLEST = 1e-12
_STEPS = 50  # of a bisection


def p_above(losses: Any, risk: float) -> NDArray[np.float64]:
    """Return (..., n) p-values of H: each expected loss, given those before it, is <= ``risk``.

    The i-th is what the first i losses say, and never rises: to look at all of them costs nothing.
    """
    return _running(check_losses(losses) / risk - 1.0, BETS_ABOVE)


def p_below(losses: Any, risk: float) -> NDArray[np.float64]:
    """Return (..., n) p-values of H: each expected loss, given those before it, is > ``risk``."""
    return _running((risk - check_losses(losses)) / (1.0 - risk), BETS_BELOW)


def _running(gains: Losses, bets: dict[float, float]) -> NDArray[np.float64]:
    """Return 1 / the largest mean wealth so far; a bet of 1 multiplies wealth by 1 + gain."""
    paths = [np.log1p(fraction * gains).cumsum(axis=-1) for fraction in bets]
    mean = logsumexp(np.stack(paths), b=_column(bets, gains.ndim), axis=0)
    found: NDArray[np.float64] = np.exp(-np.maximum.accumulate(np.maximum(mean, 0.0), axis=-1))
    return found


def _column(bets: dict[float, float], dimensions: int) -> NDArray[np.float64]:
    return np.array([*bets.values()]).reshape(-1, *[1] * dimensions)


def risk_interval(losses: Any, level: float) -> tuple[float, float]:
    """Return bounds on the risk of (n,) losses, each of which ever fails with this probability.

    The lower bound is the largest risk that ``p_above`` rejects, the upper bound the smallest one
    that ``p_below`` rejects. The losses must have one expected value, given those before them.
    """
    low = _edge(lambda risk: bool(p_above(losses, risk)[-1] <= level))
    high = _edge(lambda risk: bool(p_below(losses, risk)[-1] > level))
    return (low if low > 2 * _SMALLEST else 0.0), (high if high < 1 - 2 * _SMALLEST else 1.0)


def _edge(holds: Callable[[float], bool]) -> float:
    """Return where a condition that holds for small risks stops holding."""
    least, most = _SMALLEST, 1.0 - _SMALLEST
    for _ in range(_STEPS):
        middle = (least + most) / 2
        least, most = (middle, most) if holds(middle) else (least, middle)
    return (least + most) / 2


@dataclass(frozen=True, kw_only=True)
class DriftCheck:
    """The result of testing a certificate on new text."""

    n: int
    risk: float
    "Risk on the new text, in the unit of the certificate."
    risk_low: float
    "Lower bound on the risk; it ever fails with the probability ``level``."
    risk_high: float
    "Upper bound on the risk; it ever fails with the probability ``level``."
    epsilon: float
    p_broken: float
    "p-value of 'risk <= epsilon'; a small value means that the promise is broken."
    p_holds: float
    "p-value of 'risk > epsilon'; a small value means that the promise holds on the new text."
    level: float
    verdict: Verdict
    decided_after: int | None
    "Number of sequences after which the verdict was certain; None if it is not."
    compute_pct: float
    flops_pct: float | None


def check_drift(
    certificate: Certificate,
    trace: ExitTrace,
    *,
    level: float = DEFAULT_DELTA,
    cost: ModelCost | None = None,
) -> DriftCheck:
    """Test on new text whether the risk is still at most epsilon; the unit is the sequence.

    ``level`` is the probability of each wrong verdict: "broken" for a promise that holds, and
    "holds" for one that is broken. It covers all checks of a text to which sequences are added at
    the end. A text on which both are certain has changed, and the verdict is "broken".
    """
    check_levels(level=level, epsilon=certificate.epsilon / certificate.bound)
    trace = whole_sequences(trace)
    losses = sequence_losses(
        trace,
        (certificate.thresholds,),
        confidence=certificate.confidence,
        risk=certificate.risk,
        bound=certificate.bound,
    )[:, 0]
    [row] = sweep(trace, [certificate.thresholds], confidence=certificate.confidence, cost=cost)
    return drift(
        certificate, losses, level=level, compute_pct=row.compute_pct, flops_pct=row.flops_pct
    )


def drift(
    certificate: Certificate,
    losses: Any,
    *,
    level: float,
    compute_pct: float,
    flops_pct: float | None,
) -> DriftCheck:
    """Test whether (n,) losses from 0 to 1, in the order of the text, keep a certificate's risk.

    The costs are those of the thresholds on the new text; see ``check_drift``.
    """
    scale = certificate.bound
    epsilon = certificate.epsilon / scale
    check_levels(level=level, epsilon=epsilon)
    broken, holds = p_above(losses, epsilon), p_below(losses, epsilon)
    verdict: Verdict = "undecided"
    decided: int | None = None
    if broken[-1] <= level:
        verdict, decided = "broken", int(np.argmax(broken <= level)) + 1
    elif holds[-1] <= level:
        verdict, decided = "holds", int(np.argmax(holds <= level)) + 1
    low, high = risk_interval(losses, level)
    return DriftCheck(
        n=len(losses),
        risk=float(losses.mean()) * scale,
        risk_low=low * scale,
        risk_high=high * scale,
        epsilon=certificate.epsilon,
        p_broken=float(broken[-1]),
        p_holds=float(holds[-1]),
        level=level,
        verdict=verdict,
        decided_after=decided,
        compute_pct=compute_pct,
        flops_pct=flops_pct,
    )
