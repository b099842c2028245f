"""The seed document's "mathematical equivalence": without a loss in between, training on
``forward_all_layers`` and on ``forward_train`` is the same, in loss and in gradients.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from offramp.exits.weights import asymmetric
from offramp.training.config import TrainConfig
from offramp.training.exit_loss import ExitLoss


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gradients(model):
    taken = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return taken


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("exit_head", ["shared", "norm", "full"])
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0])
def test_three_ways_to_train_give_one_loss_and_one_gradient(
    make_model, make_ids, norm, exit_head, alpha
):
    model = make_model(norm=norm, exit_head=exit_head, num_hidden_layers=4, exit_layers=(1,))
    text = make_ids(3, 9)
    inputs, targets = text[:, :-1], text[:, 1:]

    every = model.forward_all_layers(inputs)
    first, last = cross_entropy(every[0], targets), cross_entropy(every[-1], targets)
    by_all_layers = alpha * first + (1 - alpha) * last
    by_all_layers.backward()
    expected = gradients(model)

    shallow, deep = model.forward_train(inputs)
    by_train = alpha * cross_entropy(shallow, targets) + (1 - alpha) * cross_entropy(deep, targets)
    by_train.backward()
    assert_close(by_train, by_all_layers, rtol=0, atol=1e-10)
    assert_close(gradients(model), expected, rtol=0, atol=1e-10)

    weights = asymmetric(alpha, num_layers=4)
    config = TrainConfig(loss_weights=f"asymmetric:{alpha}")
    loss, losses = ExitLoss(model, config, total_steps=1)(inputs, targets, step=1)
    loss.backward()
    assert_close(loss, by_all_layers.detach(), rtol=0, atol=1e-10)
    assert set(losses) == set(weights)
    assert_close(losses[1], first.detach(), rtol=0, atol=1e-10)
    # with alpha 1 the deep blocks do not even run: no gradient stands for a gradient of zero
    for name, gradient in gradients(model).items():
        wanted = torch.zeros_like(expected[name]) if gradient is None else gradient
        assert_close(wanted, expected[name], rtol=0, atol=1e-10)
    assert any(gradient.abs().max() > 1e-6 for gradient in expected.values())
