"""Statistics of certified thresholds, as array work.

Learn-then-Test (Angelopoulos et al. 2021) with fixed sequence testing and Hoeffding-Bentkus
p-values, and conformal risk control (Angelopoulos et al. 2022). Losses are in [0, 1]; the unit is
a *sequence*, whose loss is the mean over its tokens, since tokens of one sequence are not
independent. The path of thresholds is fixed before looking at the losses.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

Losses = NDArray[np.float64]


def hoeffding_bentkus(mean_loss: Any, n: int, epsilon: float) -> NDArray[np.float64]:
    """p-values of H: risk > epsilon, given the mean loss of n independent sequences.

    p = min( exp(-n h1(min(R, eps), eps)), e P(Bin(n, eps) <= ceil(n R)) ),
    h1(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b)) (Bates et al. 2021, theorem 4), at
    most 1. ``mean_loss`` is of any shape.
    """
    mean_loss = np.asarray(mean_loss, dtype=np.float64)
    below = np.minimum(mean_loss, epsilon)
    hoeffding = np.exp(-n * _h1(below, epsilon))
    losses = np.ceil(np.round(n * mean_loss, 9))  # a sum of fractions may be a hair off a count
    bentkus = math.e * binom.cdf(losses, n, epsilon)
    p_values: NDArray[np.float64] = np.clip(np.minimum(hoeffding, bentkus), 0.0, 1.0)
    return p_values


def drift_p_value(mean_loss: float, n: int, epsilon: float) -> float:
    """p-value of H: risk <= epsilon, the promise: small where it does not hold any more.

    The same bound with its roles turned: 1 - loss has a mean of at least 1 - epsilon.
    """
    return float(hoeffding_bentkus(1.0 - mean_loss, n, 1.0 - epsilon))


def fixed_sequence(p_values: Any, delta: float) -> NDArray[np.intp]:
    """How many steps of the path are certified: those before the first p-value above delta.

    ``p_values`` is (..., steps), from the most conservative step; testing stops there, so each
    test may use all of delta and the certified risks hold together with probability 1 - delta.
    The step to return is the last certified one, at this count - 1; 0 means none.
    """
    certified: NDArray[np.intp] = np.cumprod(np.asarray(p_values) <= delta, axis=-1).sum(axis=-1)
    return certified


def conformal_steps(losses: Any, epsilon: float) -> NDArray[np.intp]:
    """How many steps of the path conformal risk control allows: E[loss] <= epsilon at the last.

    ``losses`` is (..., n, steps) from the most conservative step. The theorem wants losses that
    only rise along the path, and disagreement with several exits does not: the running supremum
    of each sequence's does, and is at least as large. Allowed are steps whose mean is at most
    (n + 1) epsilon / n - 1 / n.
    """
    losses = np.maximum.accumulate(np.asarray(losses, dtype=np.float64), axis=-1)
    n = losses.shape[-2]
    allowed = losses.mean(axis=-2) <= (n + 1) * epsilon / n - 1.0 / n + 1e-12
    steps: NDArray[np.intp] = np.cumprod(allowed, axis=-1).sum(axis=-1)
    return steps


def _h1(a: NDArray[np.float64], b: float) -> NDArray[np.float64]:
    """KL of two coins, nats; a in [0, b]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(a > 0, a * np.log(a / b), 0.0)
        rest = np.where(a < 1, (1 - a) * np.log((1 - a) / (1 - b)), 0.0)
    return first + rest
