"""Who learns: what carries a loss weight gets gradient, everything else gets none."""

import re

import pytest

from offramp.training.config import TrainConfig
from offramp.training.exit_loss import ExitLoss


@pytest.fixture
def step(make_model, make_ids):
    """Run one step; returns the model and the names of its parameters with a gradient."""

    def run(weights, **fields):
        model = make_model(**{"num_hidden_layers": 4, "exit_layers": (1, 2), **fields})
        text = make_ids(2, 9)
        written = ",".join(f"{layer}={weight}" for layer, weight in weights.items())
        exit_loss = ExitLoss(model, TrainConfig(loss_weights=written), total_steps=1)
        loss, _ = exit_loss(text[:, :-1], text[:, 1:], step=1)
        loss.backward()
        parameters = dict(model.named_parameters())
        learning = {name for name, p in parameters.items() if p.grad is not None}
        assert all(parameters[name].grad.abs().sum() > 0 for name in learning)
        return model, learning

    return run


def blocks(names):
    return {int(found[1]) + 1 for name in names if (found := re.match(r"model.layers.(\d)", name))}


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("exit_head", ["shared", "norm", "full"])
def test_with_all_weights_every_parameter_learns(step, norm, exit_head):
    weights = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    model, learning = step(weights, norm=norm, exit_head=exit_head)
    assert learning == {name for name, _ in model.named_parameters()}


def test_blocks_above_the_last_weighted_layer_learn_nothing(step):
    _, learning = step({2: 1.0})
    assert blocks(learning) == {1, 2}
    _, learning = step({3: 1.0})
    assert blocks(learning) == {1, 2, 3}


def test_blocks_between_weighted_layers_learn(step):
    _, learning = step({1: 0.7, 4: 0.3})
    assert blocks(learning) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("weights", "exit_head", "heads"),
    [
        ({2: 1.0}, "shared", {"model.norm", "lm_head"}),
        ({2: 1.0}, "norm", {"exits.2.norm", "lm_head"}),
        ({2: 1.0}, "full", {"exits.2.norm", "exits.2.lm_head"}),
        ({1: 1.0}, "full", {"exits.1.norm", "exits.1.lm_head"}),
        ({3: 1.0}, "full", {"model.norm", "lm_head"}),
        ({4: 1.0}, "full", {"model.norm", "lm_head"}),
        (
            {1: 0.5, 4: 0.5},
            "full",
            {"exits.1.norm", "exits.1.lm_head", "model.norm", "lm_head"},
        ),
        ({1: 0.5, 2: 0.5}, "norm", {"exits.1.norm", "exits.2.norm", "lm_head"}),
    ],
)
def test_only_the_weighted_exits_heads_learn(step, weights, exit_head, heads):
    _, learning = step(weights, exit_head=exit_head)
    found = {
        name.removesuffix(".weight")
        for name in learning
        if not name.startswith(("model.layers", "model.embed_tokens"))
    }
    assert found == heads


def test_a_head_without_weight_is_never_evaluated(make_model, make_ids, monkeypatch):
    model = make_model(num_hidden_layers=4, exit_layers=(1, 2))
    exit_loss = ExitLoss(model, TrainConfig(loss_weights="1=0.5,3=0.5"), total_steps=1)
    evaluated, ran = [], []
    unembed = model.unembed
    monkeypatch.setattr(
        model, "unembed", lambda h, layer: evaluated.append(layer) or unembed(h, layer)
    )
    for i, block in enumerate(model.model.layers, start=1):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    text = make_ids(2, 9)
    loss, _ = exit_loss(text[:, :-1], text[:, 1:], step=1)
    loss.backward()
    assert (evaluated, ran) == ([1, 3], [1, 2, 3])
