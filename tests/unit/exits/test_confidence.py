import math

import pytest
import torch

from offramp.exits.confidence import CONFIDENCE, max_prob


def test_max_prob_of_a_hand_value():
    logits = torch.tensor([[math.log(6.0), math.log(3.0), 0.0], [0.0, 0.0, 0.0]])
    assert max_prob(logits).tolist() == pytest.approx([0.6, 1 / 3])


@pytest.mark.parametrize("measure", CONFIDENCE.values(), ids=CONFIDENCE.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_give_finite_scores(measure, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]], dtype=dtype)
    scores = measure(logits)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert ((scores >= 0) & (scores <= 1)).all()


def test_extreme_logits_have_the_right_max_prob():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]])
    assert max_prob(logits).tolist() == pytest.approx([1.0, 1 / 3, 0.5])


def test_a_vocabulary_of_one_is_certain():
    assert max_prob(torch.tensor([[3.7], [-1e4]])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("measure", CONFIDENCE.values(), ids=CONFIDENCE.keys())
def test_a_score_does_not_depend_on_the_batch(measure):
    logits = torch.randn(7, 5, 101, generator=torch.Generator().manual_seed(0)) * 5
    together = measure(logits)
    assert together.shape == (7, 5)
    for i in range(7):
        for t in range(5):
            assert measure(logits[i, t]) == together[i, t]


def test_max_prob_is_never_above_one():
    logits = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0)) * 30
    assert max_prob(logits).max() == 1.0
