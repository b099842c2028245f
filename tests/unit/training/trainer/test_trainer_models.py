"""What a trainer has trained is evaluated, saved, loaded, resumed and trained further."""

import pytest
import torch
import torch.nn.functional as F
from exit_trainers import (
    ExitTrainer,
    Shuffled,
    arguments,
    logged,
    parameters,
)
from torch.testing import assert_close

import offramp
from offramp.errors import CheckpointError, ConfigError
from offramp.models.base import whole_step

transformers = pytest.importorskip("transformers")


@torch.no_grad()
def cross_entropy(model, rows, layer):
    """The mean over the targets of all rows, by plain passes of one row without padding."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["input_ids"])[: sum(row["attention_mask"])][None]
        labels = torch.tensor(row["labels"])[None, 1 : ids.shape[1]]
        [(_, h)] = model.states_at(ids, [layer], step=whole_step(ids))
        logits = model.unembed(h, layer)[0, :-1]
        total += float(F.cross_entropy(logits, labels[0], reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@pytest.fixture(scope="module")
def trained(checkpoint, padded, tokenizer, tmp_path_factory):
    """A trainer after four steps, with two checkpoints and evaluations, and a saved model."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = Shuffled(
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint),
        arguments(
            folder / "run",
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            per_device_eval_batch_size=3,
            load_best_model_at_end=True,
            metric_for_best_model="eval_exit_4_loss",
        ),
        train_dataset=padded,
        eval_dataset=padded,
        processing_class=tokenizer,
        exits=[1, 2],
        loss_weights="1=0.5,4=1",
    )
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return trainer, folder


def test_evaluation_reports_every_exit(trained, padded):
    trainer, _ = trained
    metrics = trainer.evaluate()
    for layer in (1, 2, 4):
        expected = cross_entropy(trainer.exit_model, padded, layer)
        assert metrics[f"eval_exit_{layer}_loss"] == pytest.approx(expected, rel=1e-5)
    expected = 0.5 * metrics["eval_exit_1_loss"] + metrics["eval_exit_4_loss"]
    assert metrics["eval_loss"] == pytest.approx(expected)
    assert len(logged(trainer, "exit_1_loss")) == len(logged(trainer, "exit_4_loss")) == 4
    assert not logged(trainer, "exit_2_loss")  # it has no weight


def logits_of(model, ids):
    layers = list(model.exit_layers)
    with torch.no_grad():
        states = model.states_at(ids, layers, step=whole_step(ids))
        return {layer: model.unembed(h, layer) for layer, h in states}


def test_a_saved_model_and_a_checkpoint_are_opened_by_load_and_by_transformers(
    trained, ids, recwarn
):
    trainer, folder = trained
    expected = logits_of(trainer.exit_model, ids[None, :9])
    for place in (folder / "saved", folder / "run" / "checkpoint-4"):
        lm = offramp.load(place)
        assert lm.exit_layers == (1, 2, 4)
        assert lm.exits_trained
        for layer, logits in logits_of(lm.model, ids[None, :9]).items():
            assert_close(logits, expected[layer], rtol=1e-4, atol=1e-5)
        plain, report = transformers.AutoModelForCausalLM.from_pretrained(
            place, output_loading_info=True
        )
        assert not report["unexpected_keys"]
        assert not report["missing_keys"]
        assert_close(plain(ids[None, :9]).logits, expected[4], rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in trainer.model.named_modules() if "offramp" in name]


def test_the_model_in_memory_is_opened_by_load_and_saved(trained, tokenizer, ids, tmp_path):
    trainer, _ = trained
    lm = offramp.load(trainer.exit_model, tokenizer=tokenizer)
    lm.save(tmp_path / "model")
    again = offramp.load(tmp_path / "model")
    expected = logits_of(lm.model, ids[None, :9])
    for layer, logits in logits_of(again.model, ids[None, :9]).items():
        assert_close(logits, expected[layer], rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_with_the_same_parameters(trained, checkpoint, padded, tmp_path):
    whole, folder = trained
    again = Shuffled(
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint),
        arguments(tmp_path, max_steps=4),
        train_dataset=padded,
        exits=[1, 2],
        loss_weights="1=0.5,4=1",
    )
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    assert len(again.steps) == 2
    for name, value in again.steps[-1].items():
        assert_close(value, whole.steps[-1][name], rtol=0, atol=0, msg=name)


def test_other_exits_cannot_be_resumed_and_a_plain_checkpoint_neither(
    trained, checkpoint, padded, tmp_path
):
    _, folder = trained
    trainer = ExitTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint),
        arguments(tmp_path, max_steps=4),
        train_dataset=padded,
        exits=[3],
    )
    with pytest.raises(ConfigError, match=r"checkpoint-2: expected the exits 3,4 \(adapter\), got"):
        trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="expected a checkpoint with exits"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_folder_of_exits_is_trained_further(trained, padded, tmp_path):
    before, folder = trained
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "saved")
    trainer = ExitTrainer(model, arguments(tmp_path), train_dataset=padded, exits=folder / "saved")
    assert trainer.exit_model.exits_trained
    expected = before.exit_model.exits.state_dict()
    for name, value in trainer.exit_model.exits.state_dict().items():
        assert torch.equal(value, expected[name])


def test_only_the_heads_of_a_frozen_model_learn(checkpoint, padded, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).requires_grad_(False)
    trainer = ExitTrainer(
        model, arguments(tmp_path, max_steps=1), train_dataset=padded, exits=[2], exit_head="norm"
    )
    before = parameters(trainer.exit_model)
    trainer.train()
    changed = {
        name for name, value in trainer.steps[0].items() if not torch.equal(value, before[name])
    }
    assert changed == {"exits.2.norm.weight"}


def test_a_model_that_runs_only_as_a_whole_learns(ids, tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2)
    )
    rows = [{"input_ids": row, "labels": row} for row in ids[:32].view(4, 8).tolist()]
    trainer = ExitTrainer(
        model, arguments(tmp_path, max_steps=3), train_dataset=rows, exits=1, exit_head="norm"
    )
    trainer.train()
    losses = logged(trainer)
    assert losses[2] < losses[0]
    with pytest.raises(ConfigError, match=r"^detach_exits: expected a model whose blocks"):
        ExitTrainer(model, arguments(tmp_path), train_dataset=rows, exits=1, detach_exits=True)
