"""Figures as text."""

import pytest

from offramp.report.text import p_phrase, ppl_text


@pytest.mark.parametrize(
    ("ppl", "said"),
    [
        (3.14159, "3.14"),
        (999_999.0, "999999.00"),
        (30391525831.68, "3.0e+10"),
        (float("inf"), "inf"),
    ],
)
def test_a_huge_ppl_is_in_powers_of_ten(ppl, said):
    assert ppl_text(ppl) == said


@pytest.mark.parametrize(
    ("p", "said"), [(None, "p not known"), (0.0004, "p < 0.001"), (0.0123, "p = 0.012")]
)
def test_small_p_values_are_bounds(p, said):
    assert p_phrase(p) == said
