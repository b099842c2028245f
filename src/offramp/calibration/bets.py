"""The bets of the tests of a mean risk, fixed before the losses are seen. Imports only ``math``.

Against H: risk >= epsilon, a bet l multiplies the wealth by 1 + l (epsilon - loss) at every loss
in [0, 1], with l in [0, 1 / (1 - epsilon)]. Under H the expected factor is at most 1, so a mean of
such products over several bets is an e-value (Waudby-Smith & Ramdas 2024, "Estimating means of
bounded random variables by betting"): it exceeds 1 / delta with probability delta at most.
"""

import math

BOLDEST = 0.99
"""Largest bet, as a fraction of 1 / (1 - epsilon). One whole loss leaves 1% of its wealth."""
_BOLD, _EXPECTED = 0.5, 0.3
_FRACTIONS = (0.75, 0.5, 0.25, 0.1, 0.03)
_STEPS = 80  # of a bisection

Bets = tuple[tuple[float, float], ...]
"""(fraction of the largest bet, weight); the weights sum to 1."""


def fixed_bets(epsilon: float, n: int, delta: float) -> Bets:
    """Return the bets against a risk of at least ``epsilon``, for ``n`` losses.

    Half of the wealth bets boldly, which is best for losses that are small everywhere. Three
    tenths bet as is best for 0/1 losses with the largest mean that Hoeffding's bound still
    certifies from n of them. The rest is spread over smaller bets. ``delta`` only chooses bets;
    they are valid at every level.
    """
    rest = (1 - _BOLD - _EXPECTED) / len(_FRACTIONS)
    return (
        (BOLDEST, _BOLD),
        (min(BOLDEST, _best_of_binary(epsilon, n, delta)), _EXPECTED),
        *((fraction, rest) for fraction in _FRACTIONS),
    )


def _best_of_binary(epsilon: float, n: int, delta: float) -> float:
    """Return 1 - mean / epsilon, the best fraction for 0/1 losses at the edge of certification.

    The edge is the mean with n KL(mean || epsilon) = ln(1 / delta), or 0 if there is none.
    """
    least, most = 0.0, 1.0  # of mean / epsilon
    for _ in range(_STEPS):
        share = (least + most) / 2
        if n * _divergence(share * epsilon, epsilon) >= -math.log(delta):
            least = share
        else:
            most = share
    return 1.0 - least


def _divergence(mean: float, epsilon: float) -> float:
    """Return KL(Bernoulli(mean) || Bernoulli(epsilon)) in nats, for mean in [0, epsilon]."""
    lost = mean * math.log(mean / epsilon) if mean > 0 else 0.0
    return lost + (1 - mean) * (math.log1p(-mean) - math.log1p(-epsilon))


def needed_without_loss(epsilon: float, delta: float, *, bernstein: bool) -> int:
    """Return the fewest losses of 0 at which the bets reject a risk of at least ``epsilon``.

    ``bernstein``: by the empirical-Bernstein test, whose wealth grows by exp(fraction x epsilon).
    """

    def enough(n: int) -> bool:
        wealth = 0.0
        for fraction, weight in fixed_bets(epsilon, n, delta):
            edge = fraction * epsilon
            growth = edge if bernstein else math.log1p(edge / (1 - epsilon))
            wealth += weight * math.exp(min(700.0, n * growth + math.log(delta)))
        return wealth >= 1.0

    most = 1
    while not enough(most):
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most
