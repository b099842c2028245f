import math

import pytest
import torch

from offramp.exits.loss import exit_losses, weighted_sum


def test_losses_are_nats_a_token_worked_out_by_hand():
    """Exit 1 gives the targets 1/2 and 1/4; exit 3 gives them 1/8 and 1/2."""
    targets = torch.tensor([[0, 1]])

    def states():
        for layer, (first, second) in {1: (1 / 2, 1 / 4), 3: (1 / 8, 1 / 2)}.items():
            yield layer, torch.tensor([[[first, 1 - first], [1 - second, second]]])

    losses = exit_losses(states(), lambda h, layer: h.log(), targets)
    assert {layer: loss.item() for layer, loss in losses.items()} == pytest.approx(
        {1: 1.5 * math.log(2), 3: 2 * math.log(2)}
    )
    total = weighted_sum(losses, {1: 0.3, 3: 0.7})
    assert total.item() == pytest.approx((0.3 * 1.5 + 0.7 * 2) * math.log(2))


def test_a_weight_without_its_loss_is_an_error():
    with pytest.raises(KeyError):
        weighted_sum({1: torch.tensor(1.0)}, {1: 0.5, 2: 0.5})
