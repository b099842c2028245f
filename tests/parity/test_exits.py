"""Exit n is what a model of n layers would say."""

import pytest
import torch
from torch.testing import assert_close

from offramp.models.base import whole_step
from offramp.models.native.decoder import Transformer


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def truncated(model, layers):
    """A second model of this many layers with the first one's parameters."""
    config = {
        **{name: getattr(model.config, name) for name in model.config.__dataclass_fields__},
        "num_hidden_layers": layers,
        "exit_layers": (),
        "exit_head": "shared",
    }
    small = Transformer(type(model.config)(**config)).to(torch.float64)
    state = model.state_dict()
    own = f"exits.{layers}."
    for name, final in (("norm.weight", "model.norm.weight"), ("lm_head.weight",) * 2):
        if own + name in state:
            state[final] = state[own + name]
    kept = {name: state[name] for name in small.state_dict()}
    small.load_state_dict(kept)
    return small


def logits_at(model, ids, layer):
    [(_, h)] = model.states_at(ids, [layer], step=whole_step(ids))
    return model.unembed(h, layer)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("exit_head", ["shared", "norm", "full"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_last_exit_is_the_full_model(make_model, make_ids, norm, exit_head, tied):
    model = make_model(norm=norm, exit_head=exit_head, exit_layers=(1, 2), tie_word_embeddings=tied)
    ids = make_ids(2, 7)
    assert torch.equal(logits_at(model, ids, 3), model(ids))
    assert torch.equal(model.forward_all_layers(ids)[2], model(ids))
    assert torch.equal(model.forward_train(ids)[1], model(ids))


@pytest.mark.parametrize(
    ("norm", "exit_head"),
    [("pre", "shared"), ("pre", "norm"), ("pre", "full"), ("post", "shared")],
)
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_an_exit_is_the_model_truncated_there(make_model, make_ids, norm, exit_head, layer):
    model = make_model(
        norm=norm,
        exit_head=exit_head,
        num_hidden_layers=4,
        exit_layers=(1, 3),
        num_key_value_heads=2,
    )
    ids = make_ids(2, 7)
    expected = truncated(model, layer)(ids)
    assert_close(logits_at(model, ids, layer), expected)
    assert_close(model.forward_all_layers(ids)[layer - 1], expected)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_post_norm_exit_with_its_own_head_is_the_truncated_model_read_by_it(
    make_model, make_ids, layer
):
    model = make_model(norm="post", exit_head="full", exit_layers=(1, 2))
    ids = make_ids(2, 7)
    small = truncated(model, layer)
    [(_, h)] = small.states_at(ids, [layer], step=whole_step(ids))
    norm = model.exits[str(layer)].norm.weight
    head = model.exits[str(layer)].lm_head.weight
    normalised = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
    assert_close(logits_at(model, ids, layer), normalised @ head.T)


def test_the_shallow_logits_of_training_are_those_of_the_first_exit(make_model, make_ids):
    model = make_model(num_hidden_layers=4, exit_layers=(2, 3), exit_head="norm")
    ids = make_ids(2, 7)
    shallow, _ = model.forward_train(ids)
    assert_close(shallow, truncated(model, 2)(ids))
