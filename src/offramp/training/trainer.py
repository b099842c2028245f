"""Train exits in the trainers of ``transformers`` (``Trainer``) and ``trl`` (``SFTTrainer``)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.environment import environment
from offramp.errors import ConfigError
from offramp.exits.objective import ObjectiveConfig
from offramp.models.base import TrainableModel
from offramp.models.huggingface.adapter import backbone_of, checkpoint_under, is_adapted
from offramp.models.huggingface.given_exits import exits_of, with_given_exits
from offramp.options import config_of
from offramp.training.config import TrainConfig
from offramp.training.optimizer import split_by_layer
from offramp.training.trainer_batch import counted_labels, read_batch
from offramp.training.trainer_checks import check_class, check_trainer
from offramp.training.trainer_files import read_trained, write_trained
from offramp.training.trainer_loss import LONG_RUN, LossSums, TrainerLoss, called_in

_Base: Any = object
_OBJECTIVE = frozenset(field.name for field in fields(ObjectiveConfig))
_ATTACHED = "offramp_exits"
"""The name of the exits' heads in the trained model, while the trainer trains."""


class ExitLossMixin(_Base):  # type: ignore[misc]
    """Adds exits, and any objective of ``offramp train``, to a trainer of ``transformers``.

    It stands before the trainer in the bases of a class::

        class MyTrainer(offramp.training.ExitLossMixin, transformers.Trainer):
            pass

        trainer = MyTrainer(model, args, exits=[8, 16], loss_weights="asymmetric:0.5", ...)
        trainer.train()
        trainer.save_model("tuned")
        lm = offramp.load("tuned")

    The trainer's optimizer, scheduler, accumulation, clipping and checkpoints stay its own. The
    parameters of the exits' heads belong to the model while it is trained, so the optimizer has
    them. Each checkpoint is a plain checkpoint (or an adapter of peft) with two more files, which
    hold the exits; ``offramp.load`` opens it, and ``resume_from_checkpoint`` continues from it.
    Evaluation reports the cross-entropy of each exit in nats per token as
    ``eval_exit_LAYER_loss``, and their weighted sum as ``eval_loss``.

    Args:
        model: The trainer's ``model``; or a model with exits of ``offramp.from_pretrained``.
        *args: Arguments of the trainer.
        exits: Exit layers (default: at each quarter of the depth), or a folder that a trainer or
            ``offramp tune`` wrote, or a model with exits of the same backbone.
        exit_head: What a new exit has of its own: ``shared`` (nothing), ``norm``, ``adapter``
            (the default), ``full`` or ``specialist``.
        **options: Fields of ``ObjectiveConfig``, such as ``loss_weights`` (default: weight 1 at
            every exit), ``curriculum``, ``distill`` or ``layer_dropout``; and arguments of the
            trainer.

    Raises:
        ConfigError: An option does not fit the model, or the trainer's arguments ask for
            something that cannot be done with exits.
        UnsupportedArchitectureError: The model is no decoder-only language model.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_class(cls, ExitLossMixin)

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        exits: Any = None,
        exit_head: str | None = None,
        **options: Any,
    ) -> None:
        given = exits_of(model)
        if given is not None and exits is not None:
            raise ConfigError("exits: expected none with a model that has exits")
        self._exits, self._exit_head = exits if given is None else given, exit_head
        self._exit_model: TrainableModel | None = None
        self._trainer_loss: TrainerLoss | None = None
        objective = {name: options.pop(name) for name in _OBJECTIVE & options.keys()}
        self._objective = config_of(ObjectiveConfig, objective)
        self._weighted = "loss_weights" in objective
        super().__init__(model if given is None else given.backbone, *args, **options)
        check_trainer(self)
        self.model_accepts_loss_kwargs = True  # count the targets of an accumulated batch
        self._base = checkpoint_under(self.model) if is_adapted(self.model) else None
        _ = self._loss  # checks the objective

    @property
    def exit_model(self) -> TrainableModel:
        """The model with its exits, which ``offramp.load`` takes, with its tokenizer."""
        backbone = backbone_of(self.model)
        if self._exit_model is None or self._exit_model.to_transformers() is not backbone:
            found = with_given_exits(backbone, self._exits, self._exit_head, seed=self.args.seed)
            found.silence_untrained()
            if not any(each.requires_grad for each in found.parameters()):
                raise ConfigError(
                    "exit_head: expected norm, adapter, full or specialist with a frozen model, "
                    "got shared, so nothing would be trained"
                )
            self._exit_model = found
        return self._exit_model

    # The loss.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch; with ``return_outputs`` also the full model's outputs."""
        batch = read_batch(inputs)
        if self.model.training:
            step, steps = self.state.global_step + 1, int(self.state.max_steps)
            training = partial(self._loss.training, batch, step=step, total_steps=steps)
            loss = called_in(model, self.accelerator.unwrap_model(model), batch.inputs, training)
            if num_items_in_batch is not None:
                loss = loss * (batch.count / torch.as_tensor(num_items_in_batch).clamp(min=1))
                if self.args.average_tokens_across_devices:
                    loss = loss * self.accelerator.num_processes
        else:
            loss = self._loss.evaluation(batch)
        if not return_outputs:
            return loss
        plain = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            outputs = model(**plain)
        return loss, {"loss": loss, "logits": outputs.logits}

    @property
    def _loss(self) -> TrainerLoss:
        """The losses of the model with its exits."""
        model = self.exit_model
        if self._trainer_loss is None or self._trainer_loss.model is not model:
            process = (self.accelerator.process_index, self.accelerator.num_processes)
            steps = self.args.max_steps if self.args.max_steps > 0 else LONG_RUN
            self._trainer_loss = TrainerLoss(
                model, self._config(), total_steps=steps, process=process
            )
        return self._trainer_loss

    def _config(self) -> TrainConfig:
        objective = asdict(self._objective)
        if not self._weighted:
            objective["loss_weights"] = ",".join(f"{n}=1" for n in self.exit_model.exit_layers)
        bfloat16 = self.accelerator.mixed_precision == "bf16"
        return TrainConfig(
            **objective,
            seed=self.args.seed,
            precision="bfloat16" if bfloat16 else "float32",
            batch_size=self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self.accelerator.num_processes,
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the targets of a step, among which the first token of a text is not."""
        counted = [{**each, "labels": counted_labels(each)} for each in batch_samples]
        return super()._get_num_items_in_batch(counted, device)

    # Training.

    def train(self, *args: Any, **options: Any) -> Any:
        """Train, as the trainer does; afterwards the trainer's model is without exits again."""
        try:
            return super().train(*args, **options)
        finally:
            self._detach()

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Make the optimizer, which trains the exits' heads, too."""
        given = self.optimizer is not None
        heads = self.exit_model.exits
        heads.trained = True
        if len(heads):
            self.model.add_module(_ATTACHED, heads)
        optimizer = super().create_optimizer(*args, **options)
        known = {id(each) for group in optimizer.param_groups for each in group["params"]}
        if any(each.requires_grad and id(each) not in known for each in heads.parameters()):
            raise ConfigError(
                "optimizers: expected none, or one that has the exits' parameters, too; "
                "optimizer_cls_and_kwargs chooses the trainer's"
            )
        if self._objective.layer_lr and not given:
            split_by_layer(optimizer, self.exit_model, self._objective)
        self._loss.begin()
        return optimizer

    def _detach(self) -> None:
        if hasattr(self.model, _ATTACHED):
            delattr(self.model, _ATTACHED)

    @contextmanager
    def _without_heads(self) -> Iterator[None]:
        """Take the exits' heads out of the model, as its checkpoints are plain ones."""
        attached = hasattr(self.model, _ATTACHED)
        self._detach()
        try:
            yield
        finally:
            if attached:
                self.model.add_module(_ATTACHED, self.exit_model.exits)

    # Figures.

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Return the loss of a batch, and the full model's logits only if they are needed."""
        if inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs["logits"], inputs["labels"]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate, and add the cross-entropy of each exit to the metrics."""
        self._loss.evaluated = LossSums()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._loss.evaluated.take(self.accelerator)
        for layer, mean in means.items():
            output.metrics[f"{metric_key_prefix}_exit_{layer}_loss"] = mean
        if means:
            output.metrics[f"{metric_key_prefix}_loss"] = sum(
                weight * means[layer] for layer, weight in self._loss.target.items()
            )
        return output

    def log(self, logs: dict[str, Any], *args: Any, **options: Any) -> None:
        """Log the mean cross-entropy of each exit beside the loss."""
        if "loss" in logs:
            means = self._loss.trained.take(self.accelerator)
            logs.update({f"exit_{layer}_loss": mean for layer, mean in means.items()})
        super().log(logs, *args, **options)

    # Files.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the model as the trainer does, and its exits beside it."""
        folder = Path(output_dir or self.args.output_dir)
        with self._without_heads():
            super()._save(str(folder), state_dict)
        if self.args.should_save:
            record = {
                **asdict(self._loss.config),
                "trainer": type(self).__name__,
                "steps": self.state.global_step,
                "environment": environment(str(self.args.device)),
            }
            write_trained(self.exit_model, folder, base=self._base, trained=record)

    def _load_from_checkpoint(self, folder: Any, *args: Any, **options: Any) -> None:
        super()._load_from_checkpoint(folder, *args, **options)
        read_trained(self.exit_model, Path(folder))

    def _load_best_model(self) -> None:
        with self._without_heads():
            super()._load_best_model()
        read_trained(self.exit_model, Path(self.state.best_model_checkpoint))
