"""A model with shared keys and values learns the predictions of the model that it came from."""

import copy

import pytest
import torch
import torch.nn.functional as F

from offramp.data import TokenWindows
from offramp.errors import CorpusError, TrainingError
from offramp.models.base import whole_step
from offramp.training import distill
from offramp.training.config import TrainConfig
from offramp.training.distill import distil
from offramp.training.kv_fit import with_config

CONFIG = TrainConfig(seq_len=16, batch_size=2, epochs=1, lr=3e-3, shuffle=False)


@pytest.fixture
def ids(make_ids):
    return make_ids(1, 16 * 40 + 1)[0]


@pytest.fixture
def teacher(make_model):
    return make_model(
        num_hidden_layers=4, num_key_value_heads=2, exit_layers=(1, 3), exit_head="norm"
    )


@pytest.fixture
def student(teacher):
    return with_config(teacher, kv_source_layer=1)


def divergence(student, teacher, inputs, skip=0):
    with torch.no_grad():
        p, q = (
            next(iter(model.states_at(inputs, [4], step=whole_step(inputs))))[1][:, skip:]
            for model in (teacher, student)
        )
        p, q = (F.log_softmax(teacher.unembed(h, 4), dim=-1) for h in (p, q))
        return float((p.exp() * (p - q)).sum(-1).mean())


def changed(before, model):
    return {
        name for name, value in model.state_dict().items() if not torch.equal(before[name], value)
    }


@pytest.mark.parametrize("everything", [False, True])
def test_the_student_comes_closer_and_only_what_should_learn_learns(
    student, teacher, ids, make_ids, everything
):
    was = {name: value.clone() for name, value in teacher.state_dict().items()}
    before = {name: value.clone() for name, value in student.state_dict().items()}
    held_out = make_ids(4, 16, seed=9)
    far = divergence(student, teacher, held_out)
    told = []
    distil(
        student,
        teacher,
        ids,
        TrainConfig(seq_len=16, batch_size=2, epochs=4, lr=1e-3),
        everything=everything,
        on_step=lambda *step: told.append(step),
    )
    assert divergence(student, teacher, held_out) < 0.75 * far
    assert not changed(was, teacher)
    attention = {
        f"model.layers.{layer}.self_attn.{name}.weight"
        for layer in (1, 2, 3)
        for name in ("q_proj", "o_proj", *(("k_proj", "v_proj") if layer == 1 else ()))
    }
    rest = {name for name in before if not name.startswith("exits.")}
    assert changed(before, student) == (rest if everything else attention)
    assert [step[:2] for step in told] == [(step, 80) for step in range(1, 81)]
    assert not student.training
    assert {name for name, each in student.named_parameters() if each.requires_grad} == {
        name for name in before if name.startswith("exits.")
    }


@pytest.mark.parametrize("first", [(), (1, 2)])
def test_the_loss_is_the_divergence_of_the_predicted_tokens(student, teacher, ids, first):
    told = []
    begun = copy.deepcopy(student)
    distil(
        student,
        teacher,
        ids,
        CONFIG,
        first_tokens=first,
        on_step=lambda step, total, loss: told.append(float(loss)),
    )
    inputs, _ = TokenWindows(ids, seq_len=16, first=first).batch([0, 1])
    assert told[0] == pytest.approx(divergence(begun, teacher, inputs, skip=len(first)))


@pytest.mark.parametrize("everything", [False, True])
def test_chunks_change_nothing(student, teacher, ids, monkeypatch, everything):
    found = []
    for chunk in (256, 5):
        monkeypatch.setattr(distill, "_CHUNK", chunk)
        model = copy.deepcopy(student)
        distil(model, teacher, ids[: 16 * 4 + 1], CONFIG, everything=everything)
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=1e-9)


def test_the_gradient_is_that_of_the_whole_model(student, teacher, ids):
    model = copy.deepcopy(student).requires_grad_(True)
    step = whole_step(ids[None, :16])
    h = model.run_layers(model.embed(ids[None, :16], step=step), 0, 4, step=step)
    with torch.no_grad():
        [(_, wanted)] = teacher.states_at(ids[None, :16], [4], step=whole_step(ids[None, :16]))
        target = F.log_softmax(teacher.unembed(wanted, 4), dim=-1)
    logits = F.log_softmax(model.unembed(h, 4), dim=-1)
    ((target.exp() * (target - logits)).sum() / 16).backward()
    other = copy.deepcopy(student).requires_grad_(True)
    h, wanted = distill._states(other, teacher, ids[None, :16], True)
    distill._backward(other, teacher, h, wanted, skip=0)
    for (name, one), (_, two) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        if not name.startswith("exits."):
            # the loss is computed in float32
            torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_model(student, teacher, ids):
    found = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(student)
        distil(model, teacher, ids, TrainConfig(seq_len=16, batch_size=2, epochs=1, seed=seed))
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_too_little_text_is_refused(student, teacher, ids):
    with pytest.raises(
        CorpusError, match=r"at least 33 tokens to distil \(2 x 16 and one more\), got 32"
    ):
        distil(student, teacher, ids[:32], CONFIG)


def test_a_loss_that_is_not_finite_ends_it(student, teacher, ids):
    student.model.layers[1].self_attn.o_proj.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1: expected a finite loss, got nan"):
        distil(student, teacher, ids, CONFIG)
