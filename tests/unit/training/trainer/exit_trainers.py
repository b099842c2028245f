"""Trainers of transformers that read rows in order and keep the parameters after each step."""

import pytest
import torch

from offramp.data import TokenWindows
from offramp.training import ExitLossMixin
from offramp.training.config import learning_rate_factor
from offramp.training.loop import batches_from

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
