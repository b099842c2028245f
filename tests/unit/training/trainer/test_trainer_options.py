"""What a trainer with exits takes, and what it refuses in one sentence."""

import json

import pytest
import torch
from exit_trainers import (
    ExitTrainer,
    arguments,
)

import offramp
from offramp import from_pretrained
from offramp.errors import ConfigError, OfframpError
from offramp.training import ExitLossMixin

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": [9]}, r"^exit_layers: expected layers from 1 to 4, got 9$"),
        ({"exits": "nowhere"}, r"^exits: expected a folder with offramp\.json, got nowhere$"),
        ({"exits": 1.5}, r"^exits: expected layers, a folder of exits, or a model with exits"),
        ({"exits": [True]}, r"^exits: expected layers"),
        ({"exit_head": "big"}, r"^exit_head: expected one of .*, got 'big'$"),
        ({"loss_weights": "asymetric:0.5"}, r"^loss weights: expected standard, "),
        ({"loss_weights": {2: 1.0}}, r"^loss_weights: expected a string"),
        ({"loss_weights": "2=1", "distill": 0.5}, r"^distill: .* because it is the teacher"),
        ({"alpha_end": 2.0}, r"^alpha_end: "),
    ],
)
def test_a_wrong_option_is_one_sentence(checkpoint, tmp_path, options, message):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(OfframpError, match=message):
        ExitTrainer(model, arguments(tmp_path), **options)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "^label_smoothing_factor: expected the default"),
        ({"bf16_full_eval": True}, {}, "^bf16_full_eval: expected"),
        ({}, {"compute_loss_func": print}, "^compute_loss_func: expected"),
    ],
)
def test_what_a_trainer_cannot_do_with_exits_is_one_sentence(
    checkpoint, tmp_path, fields, options, message
):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ConfigError, match=message):
        ExitTrainer(model, arguments(tmp_path, **fields), **options)


def test_exits_of_another_model_are_refused(checkpoint, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    other = from_pretrained(checkpoint, exit_layers=(2,))
    with pytest.raises(ConfigError, match="got those of another model"):
        ExitTrainer(model, arguments(tmp_path), exits=other)
    with pytest.raises(ConfigError, match=r"^exits: expected none with a model that has exits$"):
        ExitTrainer(other, arguments(tmp_path), exits=[1])
    with pytest.raises(ConfigError, match="the native decoder runs; "):
        ExitTrainer(offramp.load(checkpoint), arguments(tmp_path))
    kind = json.loads((checkpoint / "config.json").read_text())["model_type"]
    small = transformers.GPT2Config(vocab_size=60, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    gpt2 = transformers.GPT2LMHeadModel(small)
    offramp.save_exits(from_pretrained(checkpoint, exit_layers=(1,)), tmp_path / "exits")
    with pytest.raises(ConfigError, match=f"of type gpt2, got those of '{kind}'"):
        ExitTrainer(gpt2, arguments(tmp_path), exits=tmp_path / "exits")


def test_the_mixin_stands_before_the_trainer():
    with pytest.raises(ConfigError, match=r"^Wrong: expected ExitLossMixin before the trainer"):
        type("Wrong", (transformers.Trainer, ExitLossMixin), {})


def test_a_frozen_model_with_shared_heads_has_nothing_to_learn(checkpoint, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).requires_grad_(False)
    with pytest.raises(ConfigError, match="so nothing would be trained"):
        ExitTrainer(model, arguments(tmp_path), exits=[2], exit_head="shared")


def test_an_optimizer_without_the_exits_is_refused(checkpoint, padded, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ExitTrainer(
        model, arguments(tmp_path), train_dataset=padded, exits=[2], optimizers=(optimizer, None)
    )
    with pytest.raises(ConfigError, match=r"^optimizers: expected none, or one that has"):
        trainer.train()
    assert not hasattr(model, "offramp_exits")


def test_new_exits_depend_only_on_the_seed(checkpoint, tmp_path):
    found = []
    for seed, outside in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(outside)
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        trainer = ExitTrainer(model, arguments(tmp_path, seed=seed), exits=[2])
        found.append(trainer.exit_model.exits.state_dict()["2.adapter.up_proj.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_model_init_gives_every_run_new_exits(checkpoint, padded, tmp_path):
    trainer = ExitTrainer(
        None,
        arguments(tmp_path, max_steps=1),
        train_dataset=padded,
        model_init=lambda: transformers.AutoModelForCausalLM.from_pretrained(checkpoint),
        exits=[2],
    )
    first = trainer.exit_model
    trainer.train()
    assert trainer.exit_model is not first
    once = trainer.steps.pop()
    trainer.train()
    for name, value in trainer.steps[0].items():
        assert torch.equal(value, once[name])


def test_metrics_are_computed_from_the_full_models_logits(checkpoint, padded, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"rows": len(prediction.label_ids)}

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer = ExitTrainer(
        model,
        arguments(tmp_path, eval_strategy="no"),
        eval_dataset=padded,
        compute_metrics=compute_metrics,
        exits=[2],
    )
    assert trainer.evaluate()["eval_rows"] == 8
    assert seen == [(8, 12, model.config.vocab_size)]
