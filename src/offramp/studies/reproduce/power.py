"""How many seeds the reproduction needs, decided before it runs.

A finding is a paired t test over seeds. Its power depends on the true effect and on the spread of
the differences between two methods from seed to seed. The spreads below were measured once; the
number of seeds follows from them, and never from the results of the run itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offramp.studies.reproduce.published import CORPUS
from offramp.studies.statistics import SIGNIFICANT, power_of_test, seeds_for_power

EFFECT_PCT = 10.0
"""The effect that is to be found: a difference of the PPL in percent."""
WANTED_POWER = 0.9
"""The wanted probability that an effect of ``EFFECT_PCT`` is found."""


@dataclass(frozen=True, kw_only=True)
class Spreads:
    """Standard deviation over seeds of the log PPL ratio of each finding."""

    source: str
    by_finding: Mapping[int, float]
    """A finding with several rivals has the spread against the strongest one."""


PANGRAM = Spreads(
    source="16 seeds of this protocol on the pangram, threshold 0.95",
    by_finding={1: 0.096, 2: 0.128, 3: 0.063, 4: 0.096, 5: 0.103, 6: 0.111},
)
TEXT = Spreads(
    source="8 seeds of this protocol on python-docs, threshold 0.25",
    by_finding={1: 0.031, 2: 0.031, 3: 0.011, 4: 0.011, 5: 0.022, 6: 0.031},
)
RIVALS = {1: 5, 4: 2}
"""Number of rivals of the findings that compare with several: their level is divided by it."""


def spreads_of(corpus: str) -> Spreads:
    """Return the spreads for a corpus; every text has those of ``python-docs``."""
    return PANGRAM if corpus == CORPUS else TEXT


def required_seeds(corpus: str) -> int:
    """Return the number of seeds with which each finding has the wanted power."""
    spreads = spreads_of(corpus).by_finding
    return max(
        seeds_for_power(WANTED_POWER, **_test(finding, spread, len(spreads)))
        for finding, spread in spreads.items()
    )


def _test(finding: int, spread: float, findings: int) -> dict[str, float]:
    """The test of a finding, at the strictest step of Holm's correction."""
    level = SIGNIFICANT / findings / RIVALS.get(finding, 1)
    return {"effect": math.log1p(EFFECT_PCT / 100.0), "spread": spread, "significance": level}


def power(corpus: str, seeds: int) -> dict[str, Any]:
    """Return the power of each finding with that number of seeds, for results.json."""
    spreads = spreads_of(corpus)
    count = len(spreads.by_finding)
    by_finding = {
        str(finding): power_of_test(seeds=seeds, **_test(finding, spread, count))
        for finding, spread in spreads.by_finding.items()
    }
    return {
        "effect_pct": EFFECT_PCT,
        "wanted": WANTED_POWER,
        "significance": SIGNIFICANT,
        "required_seeds": required_seeds(corpus),
        "seeds": seeds,
        "lowest": min(by_finding.values()),
        "by_finding": by_finding,
        "spreads": {str(finding): spread for finding, spread in spreads.by_finding.items()},
        "spreads_from": spreads.source,
    }
