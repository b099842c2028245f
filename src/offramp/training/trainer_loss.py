"""The losses of a trainer's batches, in training and in evaluation, and their sums by exit."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp.exits.loss import weighted_exit_loss
from offramp.exits.schedules import LossSchedule, loss_schedule
from offramp.models.base import TrainableModel, whole_step
from offramp.training.checks import check_model
from offramp.training.config import TrainConfig
from offramp.training.exit_loss import ExitLoss
from offramp.training.trainer_batch import Batch

LONG_RUN = 1 << 40
"""Number of steps of a run whose length is not known yet."""


class LossSums:
    """The sum of the cross-entropies at each layer, and the number of tokens."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, parts: Mapping[int, Tensor], tokens: int) -> None:
        """Add the means of a batch of so many tokens."""
        for layer, part in parts.items():
            new = torch.tensor((float(part) * tokens, tokens), dtype=torch.float64)
            self._sums[layer] = self._sums[layer] + new if layer in self._sums else new

    def take(self, accelerator: Any) -> dict[int, float]:
        """Return the means over the tokens of all processes, and begin again."""
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        totals = torch.stack(list(sums.values()))
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(totals.to(accelerator.device), "sum")
        found = dict(zip(sums, totals.tolist(), strict=True))
        return {layer: total / tokens for layer, (total, tokens) in found.items() if tokens}


class TrainerLoss:
    """The loss of a model with exits on the batches of a trainer.

    ``process`` is the number of this process and that of all. Raises ConfigError if the model or
    a run of ``total_steps`` steps does not fit the objective.
    """

    def __init__(
        self,
        model: TrainableModel,
        config: TrainConfig,
        *,
        total_steps: int,
        process: tuple[int, int],
    ) -> None:
        check_model(model, config)
        self.model, self.config, self.process = model, config, process
        self.target = self._schedule(total_steps).target
        self.trained, self.evaluated = LossSums(), LossSums()
        self._loss: ExitLoss | None = None
        self._seen = (0, 0)

    def begin(self) -> None:
        """Forget the run before: the names of the parameters and the number of steps may change."""
        self._loss, self._seen, self.trained = None, (0, 0), LossSums()

    def training(self, batch: Batch, *, step: int, total_steps: int) -> Tensor:
        """Return the loss at a step, counted from 1, in nats for each target of the batch."""
        if self._loss is None:
            self._loss = ExitLoss(self.model, self.config, total_steps=total_steps)
        loss, parts = self._loss(
            batch.inputs,
            batch.targets,
            step=step,
            rows=self._rows(len(batch.inputs), step),
            kept=batch.kept,
        )
        self.trained.add(parts, batch.count)
        return loss  # type: ignore[no-any-return]

    @torch.no_grad()
    def evaluation(self, batch: Batch) -> Tensor:
        """Return the exits' cross-entropies, weighted as at the end of the run."""
        model, targets = self.model, batch.targets
        layers = sorted({*model.exit_layers, *self.target})
        autocast = self.config.precision == "bfloat16"
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=autocast):
            states = dict(model.states_at(batch.inputs, layers, step=whole_step(batch.inputs)))
            if batch.kept is not None:
                states = {layer: h[batch.kept][None] for layer, h in states.items()}
                targets = targets[batch.kept][None]
            _, parts = weighted_exit_loss(
                states,
                model.unembed,
                targets,
                dict.fromkeys(layers, 1.0),
                (),
                vocab_size=model.vocab_size,
            )
        self.evaluated.add(parts, batch.count)
        return torch.stack([weight * parts[layer] for layer, weight in self.target.items()]).sum()

    def _schedule(self, total_steps: int) -> LossSchedule:
        return loss_schedule(
            self.config,
            total_steps=total_steps,
            num_layers=self.model.num_layers,
            exit_layers=self.model.exit_layers,
        )

    def _rows(self, count: int, step: int) -> slice:
        """Return the rows of the global batch of a step that the next ``count`` rows are."""
        rank, processes = self.process
        begun, seen = self._seen
        seen = seen if begun == step else 0
        self._seen = (step, seen + count * processes)
        first = seen + count * rank
        return slice(first, first + count)


def called_in(
    wrapper: nn.Module, model: nn.Module, inputs: Tensor, loss: Callable[[], Tensor]
) -> Tensor:
    """Return the loss, computed in a call of the module that wraps the model, if one does.

    DistributedDataParallel averages gradients only after a call of its own ``forward``.
    """
    if wrapper is model:
        return loss()
    own = model.__dict__.get("forward")
    model.forward = lambda *args, **kwargs: loss()
    try:
        out: Tensor = wrapper(inputs)
        return out
    finally:
        del model.forward
        if own is not None:
            model.forward = own
