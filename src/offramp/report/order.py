"""Recipes whose labels differ in a number: sequential colours, and labels beside their curves."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

SEQUENCE = ("#8b6fd1", "#4f7fd0", "#2a97b5", "#22a37f", "#7fa62f", "#d08a00")
"""Colours from the least to the largest value, which are read on white and on black."""
OTHER = "#a0527a"
"""The colour of a recipe that is not one of the ordered ones."""
GAP = 0.036
"""Least distance between two labels, as a share of the height of the plot."""
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


def colours_of(labels: Sequence[str], values: Mapping[str, float]) -> list[str]:
    """Return a colour for each label: a step of ``SEQUENCE``, or ``OTHER``."""
    ranked = sorted(values, key=values.__getitem__)
    last = max(1, len(ranked) - 1)
    steps = {label: _between(place / last) for place, label in enumerate(ranked)}
    return [steps.get(label, OTHER) for label in labels]


def labels_at_ends(
    records: Sequence[Mapping[str, Any]],
    cost: str,
    values: Mapping[str, float],
    domain: tuple[float, float],
) -> tuple[list[dict[str, Any]], bool]:
    """Return a label for each curve at its end, moved so that none covers another.

    The end is the one at which the curves differ most: the cheapest points (then the second value
    is True) or the dearest. ``records`` hold points of curves ("recipe", the cost, "ppl"), and
    ``domain`` is the range of PPL that the plot shows.
    """
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        curves.setdefault(record["recipe"], []).append(record)
    sides = []
    for pick in (min, max):
        ends = {name: pick(points, key=lambda p: p[cost]) for name, points in curves.items()}
        heights = sorted(end["ppl"] for end in ends.values())
        gaps = [high - low for low, high in pairwise(heights)]
        sides.append((sorted(gaps)[len(gaps) // 2] if gaps else 0.0, pick is min, ends))
    _, cheapest, ends = max(sides, key=lambda side: side[:2])
    names = sorted(ends, key=lambda name: float(ends[name]["ppl"]))
    places = _apart([ends[name]["ppl"] for name in names], domain)
    ranked = sorted(values, key=values.__getitem__)
    labels = [
        {
            "recipe": name,
            cost: ends[name][cost],
            "ppl": place,
            "text": name if name not in values or name in ranked[:1] else f"{values[name]:g}",
        }
        for name, place in zip(names, places, strict=True)
    ]
    return labels, cheapest


def _apart(heights: Sequence[float], domain: tuple[float, float]) -> list[float]:
    """Return ascending heights with at least ``GAP`` between them, within the domain."""
    low, high = domain
    gap = GAP * (high - low)
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + gap) if found else height)
    top = high
    for place in reversed(range(len(found))):
        found[place] = min(found[place], top)
        top = found[place] - gap
    return found


def _between(share: float) -> str:
    """Return the colour at a share of the way through ``SEQUENCE``."""
    at = share * (len(SEQUENCE) - 1)
    place = min(int(at), len(SEQUENCE) - 2)
    ends = [[int(SEQUENCE[place + n][k : k + 2], 16) for k in (1, 3, 5)] for n in (0, 1)]
    mixed = [round(a + (b - a) * (at - place)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{each:02x}" for each in mixed)
