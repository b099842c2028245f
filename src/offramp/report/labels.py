"""Labels beside curves: each is placed where it covers no curve, no point and no other label.

Places are in pixels, from the upper left corner of the plot. A label has anchors, which are points
of its curve. Around each anchor, places in eight directions are tried, the nearest first, until
one is free.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import hypot

import numpy as np

Point = tuple[float, float]
STEP = 2.0
"""Distance of the samples that stand for a line."""
MARGIN = 0.27
"""Least distance between a label and anything else, which includes half a line's width. This and
the other lengths are relative to the size of the font."""
NEAR = 1.3
"""A label whose edge is further than this from its anchor is joined to it by a thin line."""
DISTANCES = (0.45, 0.8, 1.3, 1.8, 2.5, 3.5, 4.5, 6.0, 8.0, 10.0, 13.0, 16.0, 20.0, 26.0, 32.0)
DIRECTIONS = ((1, 0), (-1, 0), (1, -1), (-1, 1), (1, 1), (-1, -1), (0, -1), (0, 1))
NARROW, WIDE = frozenset("ijlI.,:;'|!()[] "), frozenset("mwMW@%")


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle, such as that of a label."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box", margin: float = 0.0) -> bool:
        """Whether two boxes have a point in common, or are nearer than a margin."""
        return (
            self.left < other.right + margin
            and other.left < self.right + margin
            and self.top < other.bottom + margin
            and other.top < self.bottom + margin
        )

    def holds(self, point: Point, margin: float) -> bool:
        """Whether a point is inside, or nearer than a margin."""
        x, y = point
        return (
            self.left - margin < x < self.right + margin
            and self.top - margin < y < self.bottom + margin
        )

    def nearest(self, point: Point) -> Point:
        """The point of this box that is nearest to a point."""
        return (
            min(max(point[0], self.left), self.right),
            min(max(point[1], self.top), self.bottom),
        )


@dataclass(frozen=True, kw_only=True)
class Label:
    """A text that belongs to a curve or a point."""

    text: str
    anchors: Sequence[Point]
    "Points of the curve at which the label may stand, the best first."


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a label stands."""

    box: Box
    anchor: Point
    has_leader: bool
    "Whether a line joins the label to its anchor, because it is far from it."

    @property
    def end(self) -> Point:
        """The point of the label that is nearest to its anchor."""
        return self.box.nearest(self.anchor)


class _Taken:
    """The places that lines and points take, as counts over the pixels above and left of each."""

    def __init__(self, size: tuple[float, float], points: Sequence[Point]) -> None:
        self._count = np.zeros((int(size[1]) + 2, int(size[0]) + 2), dtype=np.int64)
        self._sums = self._count
        self.add(points)

    def add(self, points: Sequence[Point]) -> None:
        """Take the places of these points, as far as they are in the plot."""
        height, width = self._count.shape
        for x, y in points:
            if 0 <= x < width and 0 <= y < height:
                self._count[int(y), int(x)] = 1
        self._sums = np.pad(self._count.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def meets(self, box: Box, margin: float) -> bool:
        """Whether a point is in a box, or nearer than a margin."""
        height, width = self._count.shape
        left, top = max(0, int(box.left - margin)), max(0, int(box.top - margin))
        right = min(width, int(box.right + margin) + 1)
        bottom = min(height, int(box.bottom + margin) + 1)
        sums = self._sums
        inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return bool(inside > 0)


def place(
    labels: Sequence[Label],
    *,
    lines: Sequence[Sequence[Point]],
    points: Sequence[Point],
    size: tuple[float, float],
    font: float,
) -> list[Placed | None]:
    """Return a free place for each label, in order; None where the plot has no room for one.

    Parameters
    ----------
    labels
        The labels, the most important first.
    lines
        Curves as lists of points; a label covers none of them.
    points
        Centres of marks; a label covers none of them.
    size
        Width and height of the plot; labels stay inside.
    font
        Size of the labels' font, in pixels.
    """
    taken = _Taken(size, [*(point for line in lines for point in samples(line)), *points])
    boxes: list[Box] = []
    found: list[Placed | None] = []
    for label in labels:
        width, chosen = text_width(label.text, font), None
        for placed in _candidates(label.anchors, width, font, size):
            if _is_free(placed, taken, boxes, MARGIN * font):
                chosen = placed
                boxes.append(placed.box)
                if placed.has_leader:
                    taken.add(samples((placed.anchor, placed.end)))
                break
        found.append(chosen)
    return found


def _is_free(placed: Placed, taken: _Taken, boxes: Sequence[Box], margin: float) -> bool:
    """Whether a label covers nothing at this place, and its leader no other label."""
    if taken.meets(placed.box, margin) or any(placed.box.meets(box, margin) for box in boxes):
        return False
    leader = samples((placed.anchor, placed.end)) if placed.has_leader else []
    return not any(box.holds(point, margin) for point in leader for box in boxes)


def _candidates(
    anchors: Sequence[Point], width: float, font: float, size: tuple[float, float]
) -> Iterator[Placed]:
    """Places inside the plot: near each anchor in turn, then far from each."""
    steps = [(font * distance, distance > NEAR) for distance in DISTANCES]
    near = sum(distance <= 2 * NEAR for distance in DISTANCES)
    for distances in (steps[:near], steps[near:]):
        for anchor in anchors:
            for distance, far in distances:
                for right, down in DIRECTIONS:
                    box = _beside(anchor, right * distance, down * distance, (width, font))
                    within = box.right <= size[0] and box.bottom <= size[1]
                    if within and min(box.left, box.top) >= 0:
                        yield Placed(box=box, anchor=anchor, has_leader=far)


def _beside(anchor: Point, dx: float, dy: float, size: tuple[float, float]) -> Box:
    """The box of a label that begins, ends or is centred at a distance from its anchor."""
    width, height = size
    x, y = anchor[0] + dx, anchor[1] + dy
    left = x if dx > 0 else x - width if dx < 0 else x - width / 2
    top = y if dy > 0 else y - height if dy < 0 else y - height / 2
    return Box(left=left, top=top, right=left + width, bottom=top + height)


def samples(line: Sequence[Point]) -> list[Point]:
    """Points on a line, at most ``STEP`` apart; a label that crosses the line meets one of them."""
    found = list(line[:1])
    for (x0, y0), (x1, y1) in pairwise(line):
        count = max(1, min(10_000, int(hypot(x1 - x0, y1 - y0) / STEP) + 1))
        found += [
            (x0 + (x1 - x0) * step / count, y0 + (y1 - y0) * step / count)
            for step in range(1, count + 1)
        ]
    return found


def text_width(text: str, font: float) -> float:
    """The width of a text in pixels, a little more than it takes in Helvetica or Arial."""
    return font * sum(map(_em, text))


def _em(character: str) -> float:
    if character in NARROW:
        return 0.3
    if character in WIDE or unicodedata.east_asian_width(character) in "WF":
        return 1.0
    return 0.7 if character.isupper() else 0.58


def rows_for(centres: Sequence[float], widths: Sequence[float], gap: float = 3.0) -> list[int]:
    """Return a row for each label of a line of labels: the first row in which it covers none."""
    ends: list[float] = []
    found = [0] * len(centres)
    for place in sorted(range(len(centres)), key=centres.__getitem__):
        left = centres[place] - widths[place] / 2
        row = next((row for row, end in enumerate(ends) if end + gap <= left), len(ends))
        ends[row : row + 1] = [centres[place] + widths[place] / 2]
        found[place] = row
    return found
