"""Recipes whose labels differ in a number: their order, and sequential colours."""

import re
from collections.abc import Mapping, Sequence

from offramp.report.look import Look

_NUMBERED = re.compile(r"(.*?)(-?\d+(?:\.\d+)?)")


def values_of(labels: Sequence[str]) -> dict[str, float] | None:
    """Return the number of each label that differs from the others in a number only.

    At least three labels must be of the form TEXT NUMBER with the same text; None otherwise. Other
    labels may stand beside them.
    """
    found: dict[str, dict[str, float]] = {}
    for label in labels:
        if match := _NUMBERED.fullmatch(label):
            found.setdefault(match[1], {})[label] = float(match[2])
    if not found:
        return None
    most = max(found.values(), key=len)
    rest = len(labels) - len(most)
    return most if len(most) >= 3 and rest <= len(most) / 3 else None


def colours_of(labels: Sequence[str], values: Mapping[str, float], look: Look) -> list[str]:
    """Return a colour for each label: a step of the look's ordered colours, or its other one."""
    ranked = sorted(values, key=values.__getitem__)
    last = max(1, len(ranked) - 1)
    steps = {label: _between(look.ordered, at / last) for at, label in enumerate(ranked)}
    return [steps.get(label, look.other) for label in labels]


def _between(colours: Sequence[str], share: float) -> str:
    """Return the colour at a share of the way through a sequence."""
    at = share * (len(colours) - 1)
    place = min(int(at), len(colours) - 2)
    ends = [[int(colours[place + n][k : k + 2], 16) for k in (1, 3, 5)] for n in (0, 1)]
    mixed = [round(a + (b - a) * (at - place)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{each:02x}" for each in mixed)
