import pytest
import torch

from offramp.exits.temperature import LEAST, MOST, fit_temperature


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_it_finds_the_temperature_that_the_targets_were_drawn_at(true):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 11, generator=random, dtype=torch.float64) * 3
    targets = torch.multinomial((logits / true).softmax(-1), 1, generator=random)[:, 0]
    assert fit_temperature(logits, targets) == pytest.approx(true, rel=0.03)


def test_it_stays_in_bounds():
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    assert LEAST <= fit_temperature(logits, torch.tensor([0, 0])) < 0.1
    assert 0.9 * MOST < fit_temperature(logits, torch.tensor([1, 1])) <= MOST
    assert fit_temperature(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)) > 0
