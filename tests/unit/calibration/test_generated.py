"""Losses between the text of full depth and one that was written with exits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.calibration.generated import divergence, nll_gap_loss, rouge_l_loss

WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "7"]), max_size=12)


@pytest.mark.parametrize(
    ("full", "early", "loss"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 0.0),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.5),  # what follows the first difference counts
        ([1, 2, 3, 4], [9, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [1, 2, 3], 0.25),  # one ends earlier
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([], [], 0.0),
    ],
)
def test_divergence(full, early, loss):
    assert divergence(full, early) == loss


@given(WORDS, WORDS)
def test_rouge_l_is_that_of_the_library_of_google(full, early):
    rouge_score = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_score.RougeScorer(["rougeL"])
    a, b = " ".join(full), " ".join(early)
    expected = 1.0 - scorer.score(a, b)["rougeL"].fmeasure if a or b else 0.0
    assert rouge_l_loss(a, b) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_reads_every_script():
    assert rouge_l_loss("Ωμέγα και άλφα", "ωμέγα και άλφα") == 0.0
    assert rouge_l_loss("日本語", "英語") == 1.0
    assert rouge_l_loss("...", "!") == 0.0
    assert rouge_l_loss("a", "!") == 1.0


def test_the_nll_gap_is_clipped():
    assert nll_gap_loss(2.0, 2.25, bound=0.5) == 0.5
    assert nll_gap_loss(2.0, 1.0, bound=0.5) == 0.0
    assert nll_gap_loss(2.0, float("inf"), bound=0.5) == 1.0
