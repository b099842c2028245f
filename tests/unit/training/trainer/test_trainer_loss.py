"""The exits learn in the trainers of transformers and trl what they learn in offramp's own."""

from copy import deepcopy

import pytest
import torch
from exit_trainers import (
    CHECKPOINTING,
    LR,
    SEQ,
    ExitTrainer,
    InOrder,
    LikeTune,
    arguments,
    logged,
    parameters,
    windows_in_order,
)
from torch.testing import assert_close

from offramp import from_pretrained
from offramp.commands.tune import open_for_tuning, tune
from offramp.commands.tune_config import TuneConfig
from offramp.errors import ConfigError
from offramp.training.config import TrainConfig
from offramp.training.loop import train
from offramp.training.trainer_batch import read_batch

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha_end": 0.3, "alpha_schedule": "cosine", "backbone_steps": 1},
        {"layer_dropout": 0.6, "accumulate": 2, "precision": "bfloat16"},
        {"loss_weights": "layerskip:0.2", "curriculum": "rotational:2", "layer_lr": "decay:0.5"},
        {"distill": 0.5, "gradient_equilibrium": True, "weight_warmup": "linear"},
        {"detach_exits": True},
    ],
    ids=str,
)
def test_every_objective_is_that_of_the_own_loop_step_by_step(checkpoint, ids, tmp_path, fields):
    usual = "asymmetric:0.9" if "alpha_end" in fields else "1=0.5,2=0.5,4=1"
    fields = {"loss_weights": usual, **fields}
    if "weight_warmup" in fields:
        fields["weight_warmup_steps"] = 3
    config = TrainConfig(steps=4, seq_len=SEQ, batch_size=4, lr=LR, seed=5, **fields)
    torch.manual_seed(1)
    own = from_pretrained(checkpoint, exit_layers=(1, 2), exit_head="adapter")
    other = from_pretrained(checkpoint, exit_layers=(1, 2), exit_head="adapter")
    other.exits.load_state_dict(own.exits.state_dict())
    losses, states = [], []
    train(
        own.train(),
        ids,
        ids[:SEQ],
        config,
        on_step=lambda progress: (
            losses.append(float(progress.loss)),
            states.append(parameters(own)),
        ),
    )
    dataset, _ = windows_in_order(ids, config)
    mine = {
        name: getattr(config, name) for name in fields if name not in ("accumulate", "precision")
    }
    LikeTune.joint = config
    trainer = LikeTune(
        other,
        arguments(
            tmp_path,
            max_steps=4,
            seed=5,
            bf16=config.precision == "bfloat16",
            per_device_train_batch_size=4 // config.accumulate,
            gradient_accumulation_steps=config.accumulate,
        ),
        train_dataset=dataset,
        **mine,
    )
    trainer.train()
    assert logged(trainer) == pytest.approx(losses, rel=1e-6)
    for step, (expected, found) in enumerate(zip(states, trainer.steps, strict=True), start=1):
        assert expected.keys() == found.keys()
        for name in expected:
            assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=f"{step} {name}")


def test_it_is_equal_to_tune_unfreeze_step_by_step(checkpoint, ids, tmp_path):
    config = TuneConfig(
        exit_layers=(1, 2), unfreeze=True, seq_len=SEQ, tokens=500, lr=LR, seed=3, gates=False
    )
    opened = open_for_tuning(checkpoint, config)
    begin = deepcopy(opened.model.exits.state_dict())
    losses, states = [], []

    def on_progress(progress):
        if progress.doing == "tune":
            losses.append(float(progress.loss))
            states.append(parameters(opened.model))

    tune(opened, str(checkpoint / "text.txt"), tmp_path / "tuned", config, on_progress=on_progress)
    joint = config.joint((1, 2, 4))
    dataset, steps = windows_in_order(ids[:475], joint, opened.first_tokens)  # 25 are held out
    model = from_pretrained(checkpoint, exit_layers=(1, 2), exit_head="adapter")
    model.exits.load_state_dict(begin)
    LikeTune.joint = joint
    trainer = LikeTune(
        model, arguments(tmp_path / "new", max_steps=steps, seed=3), train_dataset=dataset
    )
    trainer.train()
    assert steps == len(losses) == 7
    assert logged(trainer) == pytest.approx(losses, rel=1e-6)
    for expected, found in zip(states, trainer.steps, strict=True):
        for name in expected:
            assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("side", "checkpointing"), [("right", True), ("left", False)])
def test_the_standard_objective_is_the_trainers_own_loss(
    checkpoint, padded, tmp_path, checkpointing, side
):
    """With padding, labels of -100, accumulation, and activations that are computed again."""
    rows = padded
    if side == "left":
        rows = [
            {name: value[length:] + value[:length] for name, value in row.items()}
            for row in padded
            for length in [sum(row["attention_mask"])]
        ]
    states = []
    for kind, options in (
        (InOrder, {}),
        (ExitTrainer, {"exits": [2], "exit_head": "shared", "loss_weights": "standard"}),
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        args = arguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=0.3,
            **({CHECKPOINTING: True} if checkpointing else {}),
        )
        trainer = kind(model, args, train_dataset=rows, **options)
        trainer.train()
        states.append(
            (logged(trainer), logged(trainer, "grad_norm"), dict(model.named_parameters()))
        )
    (losses, norms, expected), (found_losses, found_norms, found) = states
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert found_norms == pytest.approx(norms, rel=1e-4)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_packed_texts_do_not_attend_to_each_other(ids):
    row = torch.cat((ids[:5], ids[40:43], ids[80:84]))[None]
    positions = torch.cat((torch.arange(5), torch.arange(3), torch.arange(4)))[None]
    batch = read_batch({"input_ids": row, "labels": row.clone(), "position_ids": positions})
    assert batch.inputs.shape == (3, 4)
    assert batch.inputs[0].tolist() == ids[:4].tolist()
    assert batch.inputs[1, :2].tolist() == ids[40:42].tolist()
    assert batch.targets[2].tolist() == [*ids[81:84].tolist(), -100]
    assert batch.count == 4 + 2 + 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": None}, r"^labels: expected a tensor \(rows, tokens\), got NoneType; Data"),
        ({"input_ids": None}, r"^input_ids: expected a tensor"),
        ({"inputs_embeds": torch.zeros(2, 4, 3)}, "^inputs_embeds: expected a batch of"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"^attention_mask: .* got \(2, 1, 4, 4\)"),
        ({"labels": torch.zeros(2, 3)}, r"^labels: expected the shape \(2, 4\)"),
        ({"position_ids": torch.tensor([[0, 1, 3, 4]])}, "^position_ids: expected 0, 1, 2"),
        ({"position_ids": torch.tensor([[1, 2, 3, 4]])}, "^position_ids: expected 0, 1, 2"),
    ],
)
def test_a_batch_that_is_not_understood_is_one_sentence(given, message):
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ConfigError, match=message):
        read_batch({"input_ids": ids, "labels": ids, **given})


def test_a_batch_without_targets_has_no_effect(checkpoint, tmp_path):
    row = {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}
    trainer = ExitTrainer(
        from_pretrained(checkpoint, exit_layers=(2,)),
        arguments(tmp_path, max_steps=1, weight_decay=0.0),
        train_dataset=[row] * 4,
    )
    before = parameters(trainer.exit_model)
    trainer.train()
    assert logged(trainer) == [0.0]
    assert all(torch.equal(before[name], value) for name, value in trainer.steps[0].items())
