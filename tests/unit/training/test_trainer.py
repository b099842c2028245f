"""The exits learn in the trainers of transformers and trl what they learn in offramp's own."""

import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import offramp
from offramp import from_pretrained
from offramp.commands.tune import open_for_tuning, tune
from offramp.commands.tune_config import TuneConfig
from offramp.data import TokenWindows, encode, load_corpus
from offramp.errors import CheckpointError, ConfigError, OfframpError
from offramp.models.base import whole_step
from offramp.models.open import open_model
from offramp.training import ExitLossMixin
from offramp.training.config import TrainConfig, learning_rate_factor
from offramp.training.loop import batches_from, train
from offramp.training.trainer_batch import read_batch

transformers = pytest.importorskip("transformers")
SEQ, LR = 16, 3e-3
CHECKPOINTING = next(  # its name changed in transformers 5
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in transformers.TrainingArguments.__dataclass_fields__
)


class InOrder(transformers.Trainer):
    """Reads the rows in their order, or shuffles them as the library does."""

    shuffled = False

    def _get_train_sampler(self, *args):
        if self.shuffled:
            return super()._get_train_sampler(*args)
        return torch.utils.data.SequentialSampler(self.train_dataset)


class ExitTrainer(ExitLossMixin, InOrder):
    """Keeps the parameters after each step."""

    def __init__(self, *args, **options):
        self.steps = []
        super().__init__(*args, **options)
        self.add_callback(Watch(self))


class Watch(transformers.TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **_):
        self.trainer.steps.append(parameters(self.trainer.exit_model))


class Shuffled(ExitTrainer):
    shuffled = True


class LikeTune(ExitTrainer):
    """Has the learning rates and the weight decay of offramp's own loop."""

    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters()]

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda done: learning_rate_factor(done + 1, num_training_steps, self.joint),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler


def parameters(model):
    """The parameters by names that do not depend on where the exits are attached."""
    heads = {
        f"exits.{name}": value.detach().clone() for name, value in model.exits.named_parameters()
    }
    backbone = model.to_transformers()
    return heads | {
        name: value.detach().clone()
        for name, value in backbone.named_parameters()
        if "offramp_exits" not in name
    }


def arguments(folder, **fields):
    usual = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": LR,
        "weight_decay": 0.01,
    }
    return transformers.TrainingArguments(**{**usual, **fields})


def logged(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.fixture(scope="module")
def ids(checkpoint):
    text = load_corpus(str(checkpoint / "text.txt")).whole
    return encode(open_model(checkpoint).tokenizer, text)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / "tokenizer.json"), pad_token=".", eos_token="."
    )


@pytest.fixture(scope="module")
def padded(ids):
    """Rows of several lengths with padding on the right, and prompts that are not learned."""
    rows = []
    for row, length in enumerate((12, 5, 9, 7, 12, 3, 8, 10)):
        tokens = ids[row * 13 : row * 13 + length].tolist()
        rest = 12 - length
        rows.append(
            {
                "input_ids": tokens + [0] * rest,
                "labels": [-100] * (row % 3 + 1) + tokens[row % 3 + 1 :] + [-100] * rest,
                "attention_mask": [1] * length + [0] * rest,
            }
        )
    return rows


def windows_in_order(ids, config, first=()):
    """The windows of offramp's own loop, each with the token that follows it, in its order."""
    windows = TokenWindows(ids, seq_len=config.seq_len, first=first)
    steps = config.total_steps(len(windows) // config.batch_size)
    found = []
    for _, indices in zip(range(steps), batches_from(windows, config, step=1), strict=False):
        inputs, targets = windows.batch(indices)
        rows = torch.cat((inputs, targets[:, -1:]), dim=1).tolist()
        found += [{"input_ids": row, "labels": row} for row in rows]
    return found, steps


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
