"""The statistical tests behind certified thresholds, as array operations.

Learn-then-Test (Angelopoulos et al. 2021) with fixed sequence testing, and conformal risk control
(Angelopoulos et al. 2022). P-values are by betting (Waudby-Smith & Ramdas 2024), by an
empirical-Bernstein supermartingale (Howard et al. 2021) or by Hoeffding-Bentkus (Bates et al.
2021). Losses are in [0, 1]. The unit is a *sequence*, whose loss is the mean over its tokens,
because tokens of one sequence are not independent. The path of thresholds and the test must be
fixed before the losses are seen.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import binom

from offramp.calibration.bets import fixed_bets
from offramp.calibration.promise import TESTS
from offramp.errors import ConfigError

Losses = NDArray[np.float64]


def p_values(losses: Any, epsilon: float, *, delta: float, test: str) -> NDArray[np.float64]:
    """Return the p-values of H: risk > epsilon at each step, from losses of (..., n, steps).

    ``test`` is betting, empirical-bernstein or hoeffding-bentkus. It and ``delta``, which only
    chooses the bets, must not depend on the losses. Raises ConfigError for losses outside [0, 1].
    """
    losses = check_losses(losses)
    if test == "betting":
        return betting(losses, epsilon, delta=delta)
    if test == "empirical-bernstein":
        return empirical_bernstein(losses, epsilon, delta=delta)
    if test != "hoeffding-bentkus":
        raise ConfigError(f"test: expected one of {', '.join(TESTS[1:])}, got {test!r}")
    return hoeffding_bentkus(losses.mean(axis=-2), losses.shape[-2], epsilon)


def betting(losses: Losses, epsilon: float, *, delta: float) -> NDArray[np.float64]:
    """Return p-values of H: risk > epsilon by betting, from losses of (..., n, steps).

    p = 1 / sum_j w_j prod_i (1 + l_j (eps - X_i)), at most 1, with the bets of ``fixed_bets``
    (Waudby-Smith & Ramdas 2024, section 4). It is valid if the expected loss of each sequence,
    given those before it, is above epsilon under H, and it does not depend on their order.
    """
    bets = fixed_bets(epsilon, losses.shape[-2], delta)
    wealth = [
        np.log1p(fraction / (1 - epsilon) * (epsilon - losses)).sum(axis=-2) for fraction, _ in bets
    ]
    return _mixed(wealth, [weight for _, weight in bets])


def empirical_bernstein(losses: Losses, epsilon: float, *, delta: float) -> NDArray[np.float64]:
    """Return p-values of H: risk > epsilon by empirical Bernstein, from (..., n, steps).

    p = 1 / sum_j w_j exp(l_j S - psi(l_j) V), S = sum_i (eps - X_i), V = sum_i (X_i - m_i)^2,
    psi(l) = -ln(1 - l) - l, where m_i is the mean of a 0 and the losses before i (Howard et al.
    2021, theorem 4; Waudby-Smith & Ramdas 2024, section 3.2).
    """
    bets = fixed_bets(epsilon, losses.shape[-2], delta)
    n = losses.shape[-2]
    centre = (np.cumsum(losses, axis=-2) - losses) / np.arange(1, n + 1)[:, None]
    total = (epsilon - losses).sum(axis=-2)
    variation = ((losses - centre) ** 2).sum(axis=-2)
    wealth = [bet * total - (-math.log1p(-bet) - bet) * variation for bet, _ in bets]
    return _mixed(wealth, [weight for _, weight in bets])


def _mixed(log_wealth: list[NDArray[np.float64]], weights: list[float]) -> NDArray[np.float64]:
    """Return 1 / the weighted mean of wealths, at most 1."""
    mean = logsumexp(np.stack(log_wealth, axis=-1), b=np.array(weights), axis=-1)
    values: NDArray[np.float64] = np.exp(-np.maximum(mean, 0.0))
    return values


def check_losses(losses: Any) -> Losses:
    """Return losses as an array. Raises ConfigError unless all are numbers from 0 to 1."""
    checked: Losses = np.asarray(losses, dtype=np.float64)
    wrong = checked[~((checked >= 0) & (checked <= 1))]
    if wrong.size:
        raise ConfigError(f"losses: expected numbers from 0 to 1, got {wrong[0]}")
    return checked


def hoeffding_bentkus(mean_loss: Any, n: int, epsilon: float) -> NDArray[np.float64]:
    """Return p-values of H: risk > epsilon, given the mean loss of n independent sequences.

    p = min( exp(-n h1(min(R, eps), eps)), e P(Bin(n, eps) <= ceil(n R)) ),
    h1(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b)) (Bates et al. 2021, theorem 4), at
    most 1. ``mean_loss`` may have any shape.
    """
    mean_loss = np.asarray(mean_loss, dtype=np.float64)
    below = np.minimum(mean_loss, epsilon)
    hoeffding = np.exp(-n * _h1(below, epsilon))
    losses = np.ceil(np.round(n * mean_loss, 9))  # remove rounding errors of the mean
    bentkus = math.e * binom.cdf(losses, n, epsilon)
    p_values: NDArray[np.float64] = np.clip(np.minimum(hoeffding, bentkus), 0.0, 1.0)
    return p_values


def fixed_sequence(p_values: Any, delta: float) -> NDArray[np.intp]:
    """Return how many steps of the path are certified: those before the first p-value > delta.

    ``p_values`` is (..., steps), from the most conservative step. Because testing stops at the
    first failure, each test may use the whole delta, and all certified risks hold together with
    probability 1 - delta. The boldest certified step has the index count - 1; 0 means none.
    """
    certified: NDArray[np.intp] = np.cumprod(np.asarray(p_values) <= delta, axis=-1).sum(axis=-1)
    return certified


def conformal_steps(losses: Any, epsilon: float) -> NDArray[np.intp]:
    """Return how many steps of the path conformal risk control allows, so that E[loss] <= epsilon.

    ``losses`` is (..., n, steps), from the most conservative step. The theorem requires losses
    that never decrease along the path. Disagreement with several exits may decrease, so it is
    replaced by its running maximum, which is at least as large. A step is allowed if the mean
    loss is at most (n + 1) epsilon / n - 1 / n, at this step and at all steps before it.
    """
    losses = np.maximum.accumulate(np.asarray(losses, dtype=np.float64), axis=-1)
    n = losses.shape[-2]
    allowed = losses.mean(axis=-2) <= (n + 1) * epsilon / n - 1.0 / n + 1e-12
    steps: NDArray[np.intp] = np.cumprod(allowed, axis=-1).sum(axis=-1)
    return steps


def _h1(a: NDArray[np.float64], b: float) -> NDArray[np.float64]:
    """Return KL(Bernoulli(a) || Bernoulli(b)) in nats, for a in [0, b]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(a > 0, a * np.log(a / b), 0.0)
        rest = np.where(a < 1, (1 - a) * np.log((1 - a) / (1 - b)), 0.0)
    return first + rest
