"""The statistical tests behind certified thresholds, as array operations.

Learn-then-Test (Angelopoulos et al. 2021) with fixed sequence testing and Hoeffding-Bentkus
p-values, and conformal risk control (Angelopoulos et al. 2022). Losses are in [0, 1]. The unit is
a *sequence*, whose loss is the mean over its tokens, because tokens of one sequence are not
independent. The path of thresholds must be fixed before the losses are seen.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

Losses = NDArray[np.float64]


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


def drift_p_value(mean_loss: float, n: int, epsilon: float) -> float:
    """Return the p-value of H: risk <= epsilon; a small value means that the promise is broken.

    It is ``hoeffding_bentkus`` for 1 - loss, whose mean is at least 1 - epsilon under H.
    """
    return float(hoeffding_bentkus(1.0 - mean_loss, n, 1.0 - epsilon))


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
