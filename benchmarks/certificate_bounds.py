"""Count the sequences that each test needs to certify a threshold.

The first table is exact: sequences without any loss. The second is simulated: the fewest sequences
with which a share of the draws (--power) is certified, for losses of a known mean and standard
deviation. Every test reads the same draws.

    python benchmarks/certificate_bounds.py
"""

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.bounds import p_values
from offramp.calibration.promise import TESTS, sequences_needed

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]
"""Draws losses in [0, 1] of this shape."""
DELTA = 0.05
MOST = 4096


def shares(mean: float, deviation: float) -> Draw:
    """Shares of a sequence that are lost, from a beta distribution."""
    total = mean * (1 - mean) / deviation**2 - 1
    return lambda random, shape: random.beta(mean * total, (1 - mean) * total, shape)


def rare(mean: float, deviation: float) -> Draw:
    """Shares that are 0 in most sequences and the same in all others: the most skewed ones."""
    share = (mean**2 + deviation**2) / mean
    return lambda random, shape: share * (random.random(shape) < mean / share)


def whole(mean: float) -> Draw:
    """Losses of 0 or 1."""
    return lambda random, shape: (random.random(shape) < mean).astype(np.float64)


LOSSES: dict[str, Draw] = {
    "shares, mean 0.01, sd 0.01": shares(0.01, 0.01),
    "shares, mean 0.01, sd 0.03": shares(0.01, 0.03),
    "shares of 0 or 0.1, mean 0.01, sd 0.03": rare(0.01, 0.03),
    "0 or 1, mean 0.01, sd 0.10": whole(0.01),
    "shares, mean 0.02, sd 0.03": shares(0.02, 0.03),
    "shares, mean 0.03, sd 0.05": shares(0.03, 0.05),
    "0 or 1, mean 0.02, sd 0.14": whole(0.02),
}


def fewest(
    test: str, draw: Draw, *, epsilon: float, power: float = 0.9, draws: int = 1000, seed: int = 0
) -> int:
    """Return the fewest sequences with which a share ``power`` of the draws is certified."""
    losses = draw(np.random.default_rng(seed), (draws, MOST))

    def enough(n: int) -> bool:
        found = p_values(losses[:, :n, None], epsilon, delta=DELTA, test=test)
        return float((found <= DELTA).mean()) >= power

    least, most = 1, MOST  # enough(most) is assumed
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--power", type=float, default=0.9)
    parser.add_argument("--draws", type=int, default=1000)
    arguments = parser.parse_args()
    tests = [name for name in reversed(TESTS) if name != "auto"]
    print("| Without loss | " + " | ".join(tests) + " |\n|---|" + "---|" * len(tests))
    for epsilon in (0.10, 0.05, 0.02, 0.01):
        needed = [sequences_needed(epsilon, DELTA, test=test) for test in tests]
        print(f"| epsilon {epsilon:.2f} | " + " | ".join(map(str, needed)) + " |")
    print(f"\n| Epsilon {arguments.epsilon:g} | " + " | ".join(tests) + " | betting / H-B |")
    print("|---|" + "---|" * (len(tests) + 1))
    for name, draw in LOSSES.items():
        found = [
            fewest(
                test,
                draw,
                epsilon=arguments.epsilon,
                power=arguments.power,
                draws=arguments.draws,
            )
            for test in tests
        ]
        ratio = found[tests.index("betting")] / found[tests.index("hoeffding-bentkus")]
        print(f"| {name} | " + " | ".join(map(str, found)) + f" | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
