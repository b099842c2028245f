import itertools
import math

import pytest
import torch

from offramp.data import batches
from offramp.errors import ConfigError, CorpusError, TrainingError
from offramp.models.native.config import DecoderConfig
from offramp.training import loop
from offramp.training.config import TrainConfig, learning_rate_factor
from offramp.training.loop import new_model, train, validate

CONFIG = DecoderConfig(vocab_size=13, hidden_size=16, num_hidden_layers=3, intermediate_size=24)
TEXT = torch.arange(8 * 4 * 5 + 1) * 3 % 13  # 5 steps an epoch
HELD_OUT = torch.arange(50) * 3 % 13


def run(*, model_seed=0, seed=0, model=None, **fields):
    config = TrainConfig(**{"seq_len": 8, "batch_size": 4, "lr": 5e-3, "seed": seed, **fields})
    model = model or new_model(CONFIG, seed=model_seed)
    return model, train(model, TEXT, HELD_OUT, config)


@pytest.fixture
def scripted(monkeypatch):
    """Let the validations have these scores, then repeat the last one for ever."""

    def script(*scores):
        left = itertools.chain(scores, itertools.repeat(scores[-1]))
        monkeypatch.setattr(loop, "validate", lambda *_: (next(left), {1: 2.0, 3: 2.0}))

    return script


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# Repeatability.


def test_the_same_seed_gives_the_same_run_bit_for_bit():
    first, one = run(steps=7, eval_every=3)
    torch.rand(3)  # the global generator has no say
    second, two = run(steps=7, eval_every=3)
    assert same(first.state_dict(), second.state_dict())
    assert one.validations == two.validations


def test_another_seed_gives_other_parameters_and_another_order():
    first, _ = run(steps=3)
    assert not same(first.state_dict(), run(steps=3, seed=1)[0].state_dict())
    assert not same(first.state_dict(), run(steps=3, model_seed=1)[0].state_dict())
    plain = [run(steps=3, seed=seed, shuffle=False)[0].state_dict() for seed in (0, 1)]
    assert same(*plain)


def test_a_new_model_depends_on_its_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first = new_model(CONFIG, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert same(first, new_model(CONFIG, seed=3).state_dict())
    assert not same(first, new_model(CONFIG, seed=4).state_dict())


def test_training_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    run(steps=6)
    assert torch.equal(torch.get_rng_state(), before)


# Length, validations, stopping.


def steps_of(result):
    return [(validation.step, validation.epoch) for validation in result.validations]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"epochs": 2}, [(5, 1), (10, 2)]),
        ({"steps": 7}, [(5, 1), (7, 2)]),
        ({"steps": 5}, [(5, 1)]),
        ({"steps": 2}, [(2, 1)]),
        ({"steps": 7, "eval_every": 3}, [(3, 1), (6, 2), (7, 2)]),
        ({"epochs": 1, "eval_every": 100}, [(5, 1)]),
    ],
    ids=str,
)
def test_a_run_is_as_long_and_validates_as_often_as_told(fields, expected):
    assert steps_of(run(**fields)[1]) == expected


@pytest.mark.parametrize(
    ("patience", "scores", "stops_after"),
    [
        (0, [3, 2, 2.5, 1], 3),
        (0, [3, 3, 1], 2),  # no better is as bad as worse
        (0, [3, 2, 1, 4], 4),
        (2, [3, 4, 4, 2, 5, 5, 5, 1], 7),
        (2, [3, 4, 4, 4, 1], 4),
        (None, [1, 2], 9),
    ],
)
def test_patience(scripted, patience, scores, stops_after):
    scripted(*map(float, scores))
    _, result = run(steps=9, eval_every=1, patience=patience)
    assert len(result.validations) == stops_after


def test_the_best_validation_is_the_first_of_equals(scripted):
    scripted(3.0, 1.0, 2.0, 1.0)
    _, result = run(steps=4, eval_every=1)
    assert [validation.is_best for validation in result.validations] == [True, True, False, False]
    assert result.best.step == 2


def test_should_stop_ends_the_run_unfinished():
    asked = []
    config = TrainConfig(seq_len=8, batch_size=4, epochs=3)
    steps, heard = [], []
    result = train(
        new_model(CONFIG, seed=0),
        TEXT,
        HELD_OUT,
        config,
        on_step=lambda progress: steps.append((progress.step, progress.epoch)),
        on_validation=heard.append,
        should_stop=lambda: asked.append(1) or len(asked) == 7,
    )
    assert steps_of(result) == [(5, 1)]
    assert (result.step, result.finished) == (7, False)
    assert steps == [(step, 1 if step <= 5 else 2) for step in range(1, 8)]
    assert tuple(heard) == result.validations


# Scores.


def test_the_loss_falls():
    losses = []
    config = TrainConfig(seq_len=8, batch_size=4, steps=40, lr=5e-3)
    model = new_model(CONFIG, seed=0)
    result = train(
        model, TEXT, HELD_OUT, config, on_step=lambda p: losses.append({**p.losses, 0: p.loss})
    )
    for layer in (1, 3):
        assert losses[-1][layer] < 0.5 * losses[0][layer]
        assert not losses[-1][layer].requires_grad
    assert losses[0][0].item() == pytest.approx(
        (0.7 * losses[0][1] + 0.3 * losses[0][3]).item(), rel=1e-6
    )
    assert losses[0][3].item() == pytest.approx(math.log(13), rel=0.3)  # nats
    assert result.validations[-1].score < result.validations[0].score
    assert set(result.best.exit_ppl) == {1, 3}


def test_the_score_is_the_weighted_loss_or_the_routed_ppl():
    model = new_model(CONFIG, seed=0)
    plain = TrainConfig(seq_len=8, batch_size=4)
    weights = {1: 0.2, 2: 1.0, 3: 0.3}
    score, ppl = validate(model, HELD_OUT, weights, plain)
    assert set(ppl) == {1, 2, 3}
    assert score == pytest.approx(sum(w * math.log(ppl[layer]) for layer, w in weights.items()))
    for select_at, layer in ((0.0, 1), (2.0, 3)):  # layer 2 is no exit, so nobody leaves there
        routed = TrainConfig(seq_len=8, batch_size=4, select_at=select_at)
        assert validate(model, HELD_OUT, weights, routed)[0] == pytest.approx(ppl[layer])


def test_a_score_that_is_not_finite_is_a_training_error(scripted):
    scripted(1.0, math.nan)
    with pytest.raises(TrainingError, match="step 4: expected a finite validation score, got nan"):
        run(steps=9, eval_every=2)


def test_a_diverging_run_is_a_training_error_without_a_warning():
    with pytest.raises(TrainingError, match="finite"):
        run(steps=5, lr=1e30)


# What a user can get wrong.


@pytest.mark.parametrize("length", [0, 1, 32])
def test_too_short_a_text_is_a_corpus_error(length):
    config = TrainConfig(seq_len=8, batch_size=4)
    with pytest.raises(CorpusError, match=f"at least 33 training tokens .* got {length}"):
        train(new_model(CONFIG, seed=0), TEXT[:length], HELD_OUT, config)
    assert len(train(new_model(CONFIG, seed=0), TEXT[:33], HELD_OUT, config).validations) == 1


@pytest.mark.parametrize("length", [0, 1])
def test_too_short_a_validation_text_is_a_corpus_error(length):
    with pytest.raises(CorpusError):
        train(
            new_model(CONFIG, seed=0), TEXT, HELD_OUT[:length], TrainConfig(seq_len=8, batch_size=4)
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("steps", "epochs", "seq_len", "batch_size", "eval_every")),
        *((name, v) for name in ("lr", "grad_clip") for v in (0.0, -1.0, math.nan, math.inf)),
        *((name, -1) for name in ("warmup_steps", "patience", "seed")),
        *(("weight_decay", v) for v in (-0.1, math.nan, math.inf)),
        ("select_at", math.nan),
    ],
)
def test_a_field_out_of_range_is_a_config_error_that_names_it(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: expected"):
        TrainConfig(**{field: value})


def test_wrong_loss_weights_are_a_config_error():
    with pytest.raises(ConfigError, match="layers from 1 to 3, got 4"):
        run(loss_weights="4=1")


# The learning rate and the optimizer.


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1]),
        ("constant", 10, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        ("cosine", 2, [0.5, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]),
        ("cosine", 3, [1 / 3, 2 / 3, 1, 0.75, 0.25, 0]),
        ("cosine", 6, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]),
    ],
)
def test_the_learning_rate_by_hand(schedule, warmup_steps, expected):
    config = TrainConfig(schedule=schedule, warmup_steps=warmup_steps)
    factors = [learning_rate_factor(step, 6, config) for step in range(1, 7)]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_steps_are_those_of_clipped_adamw_on_the_windows_in_order():
    """Three steps written out: forward_train, clip, AdamW, over the first three batches."""
    fields = {"lr": 3e-3, "grad_clip": 0.1, "warmup_steps": 2, "weight_decay": 0.3}
    trained, _ = run(steps=3, shuffle=False, loss_weights="asymmetric:0.3", **fields)
    model = new_model(CONFIG, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.3)
    read = batches(TEXT, seq_len=8, batch_size=4)
    for lr, (inputs, targets) in zip((1.5e-3, 3e-3, 3e-3), read, strict=False):
        optimizer.param_groups[0]["lr"] = lr
        shallow, deep = (
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            for logits in model.forward_train(inputs)
        )
        optimizer.zero_grad()
        (0.3 * shallow + 0.7 * deep).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        optimizer.step()
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-6)
