import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close

from offramp.calibration import specialise
from offramp.calibration.specialise import specialise_exits, with_own_heads
from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.data import batches
from offramp.errors import ConfigError
from offramp.evaluation.trace import collect_trace
from offramp.models.base import whole_step
from offramp.models.huggingface.model import HuggingFaceModel

QUICK = {"steps": 150, "batch_size": 128, "tokens": 2000}


@pytest.fixture
def text(make_ids):
    """Half its tokens follow from the one before, half are drawn."""
    ids = make_ids(1, 4000)[0]
    ids[1::2] = (ids[::2] + 3) % 13
    return ids


def windows(ids):
    return batches(ids, seq_len=16, batch_size=8, order=torch.Generator().manual_seed(0))


def said(model, ids):
    with torch.no_grad():
        return {
            layer: model.unembed(h, layer)
            for layer, h in model.states_at(ids, range(1, 4), step=whole_step(ids))
        }


def hugging_face(config, kind, *, trained=True):
    torch.manual_seed(0)
    backbone = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = HuggingFaceModel(backbone, exit_layers=(1, 2), exit_head=kind)
    model.exits.trained = trained
    return model


SHAPE = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAMA = transformers.LlamaConfig(**SHAPE, intermediate_size=24)
BLOOM = transformers.BloomConfig(vocab_size=13, hidden_size=16, n_layer=3, n_head=2)


@pytest.mark.parametrize("kind", ["shared", "norm", "adapter", "full", "specialist"])
def test_own_heads_say_what_the_exits_said(make_model, make_ids, kind):
    model, ids = make_model(exit_layers=(1, 2), exit_head=kind, dtype=torch.float32), make_ids(2, 9)
    own = with_own_heads(model, seed=0)
    before, after = said(model, ids), said(own, ids)
    assert all(torch.equal(after[layer], before[layer]) for layer in before)
    assert (own is model) == (kind in ("adapter", "full", "specialist"))
    own.exits["1"].norm.weight.data.mul_(2)
    if kind == "norm":
        assert torch.equal(said(model, ids)[1], before[1])  # nothing is shared with the first


def test_a_post_norm_model_has_no_final_norm_to_begin_with(make_model):
    with pytest.raises(ConfigError, match="post-norm"):
        with_own_heads(make_model(norm="post", exit_head="shared"), seed=0)


@pytest.mark.parametrize("kind", ["norm", "adapter", "full", "specialist"])
def test_exits_learn_from_the_tokens_that_leave_there(make_model, text, kind):
    model = make_model(exit_layers=(1, 2), exit_head=kind, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    was = collect_trace(model, batches(text, seq_len=16, batch_size=8))
    config = SpecialiseConfig(compute_budget=70, imitate=0.0, **QUICK)
    left = specialise_exits(model, windows(text), config)
    assert sum(left.values()) == pytest.approx(1)
    assert set(left) == {1, 2, 3}
    now = collect_trace(model, batches(text, seq_len=16, batch_size=8))
    assert now.ppl(3) == was.ppl(3)
    for layer in (1, 2):
        if left[layer] > 0.1:
            assert now.ppl(layer) < was.ppl(layer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or name.startswith("exits.")
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "trained"), [("shared", False), ("norm", True), ("adapter", True), ("full", True)]
)
def test_a_hugging_face_model_is_specialised_too(make_ids, text, kind, trained):
    """From tuned exits or new ones; with heads that begin with the logits of before."""
    first = hugging_face(LLAMA, kind, trained=trained)
    first.silence_untrained()
    model, ids = with_own_heads(first, seed=0), make_ids(2, 9)
    model.silence_untrained()
    assert model.exit_head == ("specialist" if kind in ("shared", "norm") else kind)
    assert (model is first) == (kind in ("adapter", "full"))
    assert model.backbone is first.backbone
    assert model.exits_trained == trained
    before = said(first, ids)
    assert all(torch.equal(found, before[layer]) for layer, found in said(model, ids).items())
    was = collect_trace(model, batches(text, seq_len=16, batch_size=8))
    backbone = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    config = SpecialiseConfig(compute_budget=80, imitate=0.0, **QUICK)
    left = specialise_exits(model, windows(text), config)
    assert sum(left.values()) == pytest.approx(1)
    now = collect_trace(model, batches(text, seq_len=16, batch_size=8))
    assert now.ppl(3) == was.ppl(3)
    assert any(left[layer] > 0.1 for layer in (1, 2))
    for layer in (1, 2):
        if left[layer] > 0.1:
            assert now.ppl(layer) < was.ppl(layer)
    assert all(torch.equal(v, backbone[n]) for n, v in model.backbone.state_dict().items())
    assert model.exits_trained


def test_a_model_that_runs_only_whole_is_refused_before_it_reads_anything():
    model = hugging_face(BLOOM, "full")
    with pytest.raises(ConfigError, match=r"^specialise: expected a model whose blocks"):
        specialise_exits(model, iter(lambda: pytest.fail("read"), None), SpecialiseConfig())


def test_an_exit_learns_from_those_who_leave_and_not_from_the_others(make_model, text, monkeypatch):
    """Whichever half of the tokens leaves there, it is told that half better than the rest."""
    found = {}
    for half in (0, 1):
        model = make_model(exit_layers=(1,), exit_head="full", dtype=torch.float32)

        def leaves(model, sample, config, half=half):
            here = sample.trace.targets % 2 == half
            return np.stack((here, ~here))

        monkeypatch.setattr(specialise, "_leaving_tokens", leaves)
        config = SpecialiseConfig(compute_budget=75, others=0.0, imitate=0.0, **QUICK)
        left = specialise_exits(model, windows(text), config)
        assert 0.3 < left[1] < 0.7
        trace = collect_trace(model, batches(text, seq_len=16, batch_size=8))
        found[half] = [trace.nll[0][trace.targets % 2 == each].mean() for each in (0, 1)]
    assert found[0][0] < found[1][0] - 0.5
    assert found[1][1] < found[0][1] - 0.5


def test_imitation_brings_the_exit_nearer_to_the_last_layer(make_model, text):
    found = {}
    for imitate in (0.0, 1.0):
        model = make_model(exit_layers=(1,), exit_head="full", dtype=torch.float32)
        config = SpecialiseConfig(compute_budget=90, others=1.0, imitate=imitate, **QUICK)
        specialise_exits(model, windows(text), config)
        trace = collect_trace(model, batches(text, seq_len=16, batch_size=8), kl=True)
        found[imitate] = trace.kl[0].mean()
    assert found[1.0] < found[0.0]


@pytest.mark.parametrize("kind", ["shared", "norm", "adapter", "full", "specialist"])
def test_an_added_exit_begins_as_the_last_layers_head_and_the_others_stay(
    make_model, make_ids, kind
):
    model, ids = make_model(exit_layers=(1,), exit_head=kind, dtype=torch.float32), make_ids(2, 9)
    own = with_own_heads(model, seed=0, add=(2,))
    assert own.exit_layers == (1, 2, 3)
    assert own.exit_head == ("specialist" if kind in ("shared", "norm") else kind)
    before, after = said(model, ids), said(own, ids)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[3], before[3])
    h = dict(own.states_at(ids, (2,), step=whole_step(ids)))[2]
    assert_close(after[2], own.unembed(h, 3))
    own.exits["1"].norm.weight.data.mul_(2)
    assert torch.equal(said(model, ids)[1], before[1])  # no parameter is shared


def test_exits_are_added_to_a_hugging_face_model(make_ids, text):
    torch.manual_seed(0)
    backbone = transformers.AutoModelForCausalLM.from_config(LLAMA).eval()
    first = HuggingFaceModel(backbone, exit_layers=(2,), exit_head="adapter")
    model = with_own_heads(first, seed=0, add=(1,))
    model.silence_untrained()
    assert model.backbone is first.backbone
    before = collect_trace(model, batches(text, seq_len=16, batch_size=8))
    config = SpecialiseConfig(
        compute_budget=90, add_exits=(1,), first_steps=100, imitate=0.0, **QUICK
    )
    left = specialise_exits(model, windows(text), config)
    assert set(left) == {1, 2, 3}
    after = collect_trace(model, batches(text, seq_len=16, batch_size=8))
    assert after.ppl(1) < before.ppl(1)
    assert after.ppl(3) == before.ppl(3)


def test_all_exits_first_learn_from_all_tokens_if_some_are_added(make_model, text):
    model = make_model(exit_layers=(2,), exit_head="full", dtype=torch.float32)
    quick = {**QUICK, "steps": 1, "compute_budget": 95, "imitate": 0.0}
    learned = {}
    for add in ((), (1,)):
        own = with_own_heads(model, seed=0, add=add)
        before = collect_trace(own, batches(text, seq_len=16, batch_size=8))
        specialise_exits(
            own, windows(text), SpecialiseConfig(add_exits=add, first_steps=300, **quick)
        )
        after = collect_trace(own, batches(text, seq_len=16, batch_size=8))
        learned[add] = {layer: before.ppl(layer) - after.ppl(layer) for layer in own.exit_layers}
    assert learned[()][2] < 0.5
    assert learned[1,][1] > 1
    assert learned[1,][2] > 1
    assert learned[1,][3] == 0


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((2,), r"add_exits: expected layers from 1 to 2 without an exit \(.*at: 2\), got 2"),
        ((3,), "add_exits: expected layers from 1 to 2 without"),
        ((1, 7), "got 7"),
    ],
)
def test_an_exit_is_added_only_where_there_is_none(make_model, layers, message):
    with pytest.raises(ConfigError, match=message):
        with_own_heads(make_model(exit_layers=(2,), exit_head="norm"), seed=0, add=layers)


def test_the_same_seed_gives_the_same_exits(make_model, text):
    states = []
    for seed in (0, 0, 1):
        torch.rand(len(states))  # whatever was drawn before
        model = make_model(exit_layers=(1,), exit_head="norm", dtype=torch.float32)
        model = with_own_heads(model, seed=seed)
        config = SpecialiseConfig(compute_budget=90, seed=seed, **QUICK)
        specialise_exits(model, windows(text), config)
        states.append(torch.cat([p.flatten() for p in model.exits.parameters()]))
    assert_close(states[0], states[1], rtol=0, atol=0)
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ({"exit_head": "shared"}, {}, "parameters of their own"),
        ({"exit_layers": (3,)}, {}, "got none"),
        ({}, {"compute_budget": 5}, "compute_budget: expected at least 3"),
        ({}, {"steps": 0}, "steps: expected at least 1"),
        ({}, {"first_steps": 0}, "first_steps: expected at least 1"),
        ({}, {"add_exits": (0, 2)}, "add_exits: expected layers of at least 1, got 0"),
        ({}, {"compute_budget": 101.0}, "compute_budget: expected from 0 to 100"),
        ({}, {"others": -0.1}, "others: expected from 0 to 1"),
        ({}, {"lr": float("nan")}, "lr: expected a finite number"),
    ],
)
def test_mistakes_get_a_sentence(make_model, text, model, config, message):
    model = make_model(**({"exit_layers": (1,), "exit_head": "norm"} | model))
    with pytest.raises(ConfigError, match=message):
        specialise_exits(model, windows(text), SpecialiseConfig(**(QUICK | config)))


def test_a_whole_number_is_the_same_config():
    whole, same = SpecialiseConfig(compute_budget=60), SpecialiseConfig(compute_budget=60.0)
    assert repr(whole) == repr(same)  # as a run's hash sees it
