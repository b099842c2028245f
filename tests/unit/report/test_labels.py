"""Labels beside curves cover no curve, no point and no other label."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from offramp.report.labels import Box, Label, place, rows_for, samples, text_width

SIZE = (400.0, 300.0)


def touches(box: Box, line) -> bool:
    """Whether a box and a line of points meet, by exact clipping of each piece."""
    return any(clipped(box, a, b) for a, b in pairwise(line))


def clipped(box: Box, a, b) -> bool:
    low, high = 0.0, 1.0
    for start, end, least, most in (
        (a[0], b[0], box.left, box.right),
        (a[1], b[1], box.top, box.bottom),
    ):
        step = end - start
        if step == 0:
            if not least <= start <= most:
                return False
            continue
        ends = sorted(((least - start) / step, (most - start) / step))
        low, high = max(low, ends[0]), min(high, ends[1])
    return low <= high


def check(placed, lines, points):
    found = [each for each in placed if each is not None]
    for each in found:
        box = each.box
        assert min(box.left, box.top) >= 0
        assert box.right <= SIZE[0]
        assert box.bottom <= SIZE[1]
        assert not any(touches(box, line) for line in lines)
        assert not any(touches(box, [point, point]) for point in points)
    for one, other in combinations(found, 2):
        assert not one.box.meets(other.box)
        for first, second in ((one, other), (other, one)):
            if first.has_leader:
                assert not touches(second.box, [first.anchor, first.end])


@pytest.mark.parametrize("seed", range(8))
def test_labels_of_random_curves(seed):
    random = np.random.default_rng(seed)
    x = np.linspace(10, 390, 30)
    lines = [
        np.stack((x, np.clip(150 + np.cumsum(random.normal(0, 9, 30)), 0, 300)), axis=1).tolist()
        for _ in range(6)
    ]
    labels = [Label(text=f"curve {n}", anchors=line) for n, line in enumerate(lines)]
    points = [point for line in lines for point in line]
    placed = place(labels, lines=lines, points=points, size=SIZE, font=11)
    assert None not in placed
    check(placed, lines, points)


def test_curves_that_end_at_one_point_keep_their_labels_apart():
    lines = [[(10.0, 20.0 * n), (390.0, 150.0)] for n in range(12)]
    labels = [Label(text=f"a long name {n}", anchors=line[::-1]) for n, line in enumerate(lines)]
    placed = place(labels, lines=lines, points=[(390.0, 150.0)], size=SIZE, font=11)
    check(placed, lines, [(390.0, 150.0)])
    assert sum(each is not None for each in placed) >= 8


def test_a_label_without_room_is_left_out_and_the_others_stay():
    wall = [[(0.0, float(y)), (400.0, float(y))] for y in range(0, 301, 6)]
    labels = [Label(text="no room", anchors=[(200.0, 150.0)])]
    assert place(labels, lines=wall, points=[], size=SIZE, font=11) == [None]
    wide = Label(text="x" * 500, anchors=[(200.0, 150.0)])
    short = Label(text="x", anchors=[(200.0, 150.0)])
    placed = place([wide, short], lines=[], points=[], size=SIZE, font=11)
    assert placed[0] is None
    assert placed[1] is not None
    assert not placed[1].has_leader


def test_no_labels_and_no_curves():
    assert place([], lines=[], points=[], size=SIZE, font=11) == []


def test_samples_are_close_together():
    line = [(0.0, 0.0), (30.0, 40.0), (30.0, 40.0)]
    found = np.asarray(samples(line))
    assert np.linalg.norm(np.diff(found, axis=0), axis=1).max() <= 2.0
    assert (found[0].tolist(), found[-1].tolist()) == ([0, 0], [30, 40])


def test_wide_characters_are_wide():
    assert text_width("漢字", 10) >= 20
    assert text_width("il", 10) < text_width("mw", 10)


def test_labels_of_a_line_move_to_another_row_where_they_would_meet():
    centres, widths = [10.0, 12.0, 100.0, 14.0], [20.0, 20.0, 20.0, 20.0]
    rows = rows_for(centres, widths)
    assert rows == [0, 1, 0, 2]
