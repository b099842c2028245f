"""The training loop."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count

import torch
from jaxtyping import Int
from torch import Tensor, nn

from offramp.data import TokenShards, TokenWindows, batch_indices
from offramp.errors import CheckpointError, CorpusError, TrainingError
from offramp.models.base import TrainableModel
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.training.checkpoint import Checkpoints
from offramp.training.config import TrainConfig
from offramp.training.distributed import (
    averaging,
    callable_in_parts,
    check_processes,
    distribute,
    join,
)
from offramp.training.exit_loss import ExitLoss
from offramp.training.optimizer import make_optimizer, set_learning_rate
from offramp.training.validation import Validation, stale, validate

Tokens = Int[Tensor, " N"] | TokenShards


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of a run. The losses stay on the device until they are read."""

    step: int
    total_steps: int
    epoch: int
    "The epoch, counted from 1."
    loss: Tensor
    "The weighted loss of this step, in nats per token."
    losses: dict[int, Tensor]
    "The cross-entropy at each weighted layer, in nats per token."
    lr: float
    "The learning rate before the factors of --layer-lr."


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a run. The model that was passed in has the parameters of the last step."""

    step: int
    validations: tuple[Validation, ...]
    finished: bool
    "False if ``should_stop`` ended the run early."

    @property
    def best(self) -> Validation:
        """The best validation; the first one if several are equal."""
        return min(self.validations, key=lambda validation: validation.score)


def new_model(config: DecoderConfig, *, seed: int) -> Transformer:
    """Make a decoder whose random parameters depend only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(config)


def train(
    model: TrainableModel,
    train_tokens: Tokens,
    validation_ids: Int[Tensor, " M"],
    config: TrainConfig,
    *,
    on_step: Callable[[Progress], None] | None = None,
    on_validation: Callable[[Validation], None] | None = None,
    on_damaged: Callable[[str], None] = lambda sentence: None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoints: Checkpoints | None = None,
    first_tokens: Sequence[int] = (),
) -> TrainResult:
    """Train the model in place, on the device it is on.

    Windows are contiguous. Incomplete windows and batches of the training text are dropped; the
    validation text is read completely. With ``checkpoints`` the run continues from the newest
    complete checkpoint, if there is one, and reaches the same parameters as a run without a
    break; ``on_damaged`` is called with a sentence for each damaged checkpoint. ``should_stop``
    is called after each step; if it returns True, a checkpoint is written and the run ends
    unfinished.

    If the program was started by torchrun or ``accelerate launch``, each process computes its
    share of every batch on its own device and makes all these calls; only rank 0 writes
    checkpoints. If one process stops, all stop. A sharded model stays sharded: see
    ``whole_model``.

    Raises ConfigError if the config does not fit the model or the processes, CorpusError for
    too little text, and TrainingError if a loss or a validation score is not finite.
    """
    run = TrainingRun(model, train_tokens, validation_ids, config, checkpoints, first_tokens)
    run.resume(on_damaged)
    while not run.finished:
        progress = run.step()
        if on_step:
            on_step(progress)
        if run.validates:
            validation = run.validate()
            if on_validation:
                on_validation(validation)
        stopped = run.processes.any(should_stop()) and not run.finished
        if run.saves or stopped:
            run.save()
        if stopped:
            break
    return TrainResult(step=run.done, validations=tuple(run.validations), finished=run.finished)


class TrainingRun:
    """A training run after ``done`` steps.

    ``train`` calls its methods: ``resume`` once, and then ``step``, ``validate`` if ``validates``
    and ``save`` if ``saves``, until it is ``finished``.
    """

    def __init__(
        self,
        model: TrainableModel,
        train_tokens: Tokens,
        validation_ids: Int[Tensor, " M"],
        config: TrainConfig,
        checkpoints: Checkpoints | None = None,
        first_tokens: Sequence[int] = (),
    ) -> None:
        self.model, self.config, self.checkpoints = model, config, checkpoints
        self.validation_ids = validation_ids
        self.processes = join(model.device)
        check_processes(config, self.processes)
        self.windows = TokenWindows(train_tokens, seq_len=config.seq_len, first=first_tokens)
        self.steps_an_epoch = len(self.windows) // config.batch_size
        if self.steps_an_epoch < 1:
            raise CorpusError(
                f"corpus: expected at least {config.seq_len * config.batch_size + 1} training "
                f"tokens ({config.batch_size} x {config.seq_len} and one more), "
                f"got {len(train_tokens)}"
            )
        self.total_steps = config.total_steps(self.steps_an_epoch)
        self.eval_every = config.eval_every or self.steps_an_epoch
        self.checkpoint_every = config.checkpoint_every or self.eval_every
        exit_loss = ExitLoss(model, config, total_steps=self.total_steps)
        self.target = exit_loss.schedule.target
        for block in model.block_modules if config.compile else ():
            block.compile()
        self.module = distribute(exit_loss, config, self.processes)
        self.optimizer = make_optimizer(model, config)
        self.done = 0
        self.validations: list[Validation] = []
        self._batches: Iterator[Tensor] = iter(())

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or there was no new best validation within ``patience``."""
        return self.done >= self.total_steps or stale(self.validations, self.config)

    @property
    def validates(self) -> bool:
        """Whether there is a validation after the last step."""
        return self.done == self.total_steps or self.done % self.eval_every == 0

    @property
    def saves(self) -> bool:
        """Whether there is a checkpoint after the last step and its validation."""
        return self.done % self.checkpoint_every == 0 or self.finished

    @property
    def epoch(self) -> int:
        """The epoch of the last step, counted from 1."""
        return (self.done - 1) // self.steps_an_epoch + 1

    def resume(self, on_damaged: Callable[[str], None] = lambda sentence: None) -> None:
        """Load the newest complete checkpoint, if there is one, and continue after its step."""
        if self.checkpoints:
            state, damaged = self.checkpoints.load_latest(
                self.model, self.optimizer, self.processes
            )
            for sentence in damaged:
                on_damaged(sentence)
            if state:
                self.done, self.validations = state.step, list(state.validations)
        self._batches = batches_from(self.windows, self.config, step=self.done + 1)

    def save(self) -> None:
        """Write a checkpoint of the last step, if the run has checkpoints."""
        if self.checkpoints:
            about = {"validations": [asdict(validation) for validation in self.validations]}
            self.checkpoints.save(self.done, self.model, self.optimizer, about, self.processes)

    def step(self) -> Progress:
        """Take one step of the optimizer on the next batch.

        Raises TrainingError if the loss is not finite, after a checkpoint of the previous step is
        written.
        """
        step, indices = self.done + 1, next(self._batches)
        lr = set_learning_rate(self.optimizer, step, self.total_steps, self.config)
        loss, losses = self._backward(step, indices)
        bad = [str(layer) for layer, part in losses.items() if not torch.isfinite(part)]
        if bad:
            self.save()
            raise TrainingError(
                f"step {step}: expected a finite loss, got {float(loss)} (layer {', '.join(bad)}; "
                f"windows {int(indices[0])} to {int(indices[-1])} of the training text); "
                "the model keeps the parameters of the previous step"
            )
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done = step
        return Progress(
            step=step,
            total_steps=self.total_steps,
            epoch=self.epoch,
            loss=loss,
            losses=losses,
            lr=lr,
        )

    def _backward(self, step: int, indices: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Run forward and backward on this process's rows of a batch, in ``accumulate`` parts.

        Returns (loss, CE by layer) of the global batch.
        """
        mine = self.processes.rows(len(indices))
        part_size = (mine.stop - mine.start) // self.config.accumulate
        share = part_size / (mine.stop - mine.start)
        total: Tensor | float = 0.0
        losses: dict[int, Tensor] = {}
        for start in range(mine.start, mine.stop, part_size):
            rows = slice(start, start + part_size)
            read = self.windows.batch(indices[rows])
            inputs, targets = (ids.to(self.processes.device) for ids in read)
            with averaging(self.module, last=rows.stop == mine.stop):
                loss, parts = self.module(inputs, targets, step=step, rows=rows)
                (loss * share).backward()
            total = total + loss.detach() * share
            for layer, part in parts.items():
                losses[layer] = losses.get(layer, torch.zeros_like(part)) + part * share
        assert isinstance(total, Tensor)
        return self.processes.mean(total, losses)

    def validate(self) -> Validation:
        """Evaluate the model on the validation text; all processes use the score of rank 0.

        Raises TrainingError if the score or an exit's logits are not finite, after a checkpoint is
        written.
        """
        try:
            with callable_in_parts(self.module):
                first = self.windows.first
                found = validate(self.model, self.validation_ids, self.target, self.config, first)
        except CheckpointError as error:
            self.save()
            raise TrainingError(f"step {self.done}: {error}") from None
        score, exit_ppl = self.processes.from_main(found)
        if not math.isfinite(score):
            self.save()
            raise TrainingError(
                f"step {self.done}: expected a finite validation score, got {score}"
            )
        best = min((seen.score for seen in self.validations), default=math.inf)
        latest = Validation(
            step=self.done,
            epoch=self.epoch,
            score=score,
            exit_ppl=exit_ppl,
            is_best=score < best,
        )
        self.validations.append(latest)
        return latest


def batches_from(windows: TokenWindows, config: TrainConfig, *, step: int) -> Iterator[Tensor]:
    """Yield the windows of each step from ``step`` (counted from 1) on, over endless epochs."""
    steps_an_epoch = len(windows) // config.batch_size
    for epoch in count((step - 1) // steps_an_epoch):
        chosen = batch_indices(
            len(windows),
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            shuffle=config.shuffle,
            start=step - 1 - epoch * steps_an_epoch,
        )
        for indices in chosen:
            yield indices
            step += 1
