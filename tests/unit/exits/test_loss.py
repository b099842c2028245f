"""The chunked loss against the plain one, and against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from offramp.exits import loss as loss_module
from offramp.exits.loss import head_parameters, weighted_exit_loss

VOCABULARY, WIDTH = 11, 6


def test_losses_are_nats_a_token_worked_out_by_hand():
    """Exit 1 gives the targets 1/2 and 1/4; exit 3 gives them 1/8 and 1/2."""
    targets = torch.tensor([[0, 1]])
    states = {
        layer: torch.tensor([[[first, 1 - first], [1 - second, second]]])
        for layer, (first, second) in {1: (1 / 2, 1 / 4), 3: (1 / 8, 1 / 2)}.items()
    }
    total, parts = weighted_exit_loss(
        states, lambda h, layer: h.log(), targets, {1: 0.3, 3: 0.7}, [], vocab_size=2
    )
    assert {layer: part.item() for layer, part in parts.items()} == pytest.approx(
        {1: 1.5 * math.log(2), 3: 2 * math.log(2)}
    )
    assert total.item() == pytest.approx((0.3 * 1.5 + 0.7 * 2) * math.log(2))


def test_a_weight_without_its_state_is_an_error():
    with pytest.raises(KeyError):
        weighted_exit_loss(
            {1: torch.zeros(1, 1, 2)},
            lambda h, layer: h,
            torch.zeros(1, 1, dtype=torch.long),
            {1: 0.5, 2: 0.5},
            [],
            vocab_size=2,
        )


class Heads(nn.Module):
    """Two exits that share a head, and one of its own with a norm; and one that nobody uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(WIDTH, VOCABULARY, bias=False).double()
        self.own = nn.Linear(WIDTH, VOCABULARY, bias=False).double()
        self.norm = nn.RMSNorm(WIDTH).double()
        self.idle = nn.Linear(WIDTH, VOCABULARY, bias=False).double()

    def unembed(self, h, layer):
        return self.own(self.norm(h)) if layer == 2 else self.shared(h).tanh() * 3


def plain(states, unembed, targets, weights, distill=0.0, temperature=1.0):
    teacher = F.log_softmax(unembed(states[max(weights)], max(weights)).detach() / temperature, -1)
    total = 0.0
    for layer, weight in weights.items():
        logits = unembed(states[layer], layer)
        part = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if distill and layer != max(weights):
            student = F.log_softmax(logits / temperature, -1)
            gap = (teacher.exp() * (teacher - student)).sum(-1).mean()
            part = part + distill * temperature**2 * gap
        total = total + weight * part
    return total


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("distill", "temperature"), [(0.0, 1.0), (0.4, 1.0), (0.4, 2.5)])
def test_loss_and_gradients_are_those_of_the_plain_loss(monkeypatch, chunk, distill, temperature):
    monkeypatch.setattr(loss_module, "MIN_CHUNK", 1)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk * VOCABULARY)
    heads = Heads()
    weights = {1: 0.2, 2: 0.3, 4: 0.7}
    targets = torch.randint(0, VOCABULARY, (3, 5))
    leaves = {layer: torch.randn(3, 5, WIDTH, dtype=torch.float64) for layer in weights}
    gradients = []
    for way in (plain, None):
        heads.zero_grad()
        states = {layer: leaf.clone().requires_grad_() for layer, leaf in leaves.items()}
        if way:
            total = plain(states, heads.unembed, targets, weights, distill, temperature)
        else:
            parameters = dict(heads.named_parameters())
            names = head_parameters(heads.unembed, weights, parameters, hidden_size=WIDTH)
            assert set(names) == {"shared.weight", "own.weight", "norm.weight"}
            total, _ = weighted_exit_loss(
                states,
                heads.unembed,
                targets,
                weights,
                [parameters[name] for name in names],
                vocab_size=VOCABULARY,
                distill=distill,
                temperature=temperature,
            )
        (2.0 * total).backward()  # a factor, as gradient accumulation has
        found = {name: value.grad for name, value in heads.named_parameters()}
        found |= {str(layer): state.grad for layer, state in states.items()}
        gradients.append((total.detach(), found))
    (expected_loss, expected), (loss, found) = gradients
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-12)
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)


def test_frozen_heads_get_no_gradient_and_states_still_do():
    heads = Heads()
    heads.requires_grad_(False)
    state = torch.randn(1, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    names = head_parameters(heads.unembed, [1], dict(heads.named_parameters()), hidden_size=WIDTH)
    assert names == ()
    total, _ = weighted_exit_loss(
        {1: state},
        heads.unembed,
        torch.zeros(1, 4, dtype=torch.long),
        {1: 1.0},
        [],
        vocab_size=VOCABULARY,
    )
    total.backward()
    assert state.grad is not None
    assert state.grad.abs().max() > 0


def test_without_gradients_no_graph_is_built():
    heads = Heads()
    with torch.no_grad():
        total, _ = weighted_exit_loss(
            {1: torch.randn(1, 4, WIDTH, dtype=torch.float64)},
            heads.unembed,
            torch.zeros(1, 4, dtype=torch.long),
            {1: 1.0},
            list(heads.parameters()),
            vocab_size=VOCABULARY,
        )
    assert not total.requires_grad
