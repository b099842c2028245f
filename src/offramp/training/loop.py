"""The training loop."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from offramp.data import TokenShards, TokenWindows, batch_indices, batches
from offramp.errors import ConfigError, CorpusError, TrainingError
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import collect_trace
from offramp.exits.weights import LossWeights
from offramp.models.base import EarlyExitModel
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.training.checkpoint import Checkpoints
from offramp.training.config import TrainConfig
from offramp.training.distributed import (
    Processes,
    averaging,
    callable_in_parts,
    check_processes,
    distribute,
    join,
)
from offramp.training.exit_loss import ExitLoss, Trainable
from offramp.training.optimizer import make_optimizer, set_learning_rate

Tokens = Int[Tensor, " N"] | TokenShards


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after a step. The losses stay on the device until somebody reads them."""

    step: int
    total_steps: int
    epoch: int
    "Counted from 1."
    loss: Tensor
    "The weighted loss of this step, nats a token."
    losses: dict[int, Tensor]
    "Its parts: the cross-entropy at each weighted layer."
    lr: float
    "The learning rate, but for the factors of --layer-lr."


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One look at the validation text."""

    step: int
    epoch: int
    score: float
    "What the run minimises: the routed PPL at select_at, or the weighted loss in nats."
    exit_ppl: dict[int, float]
    is_best: bool


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to. The model that was passed in holds the last step's parameters."""

    step: int
    validations: tuple[Validation, ...]
    finished: bool
    "False where should_stop ended the run before its time."

    @property
    def best(self) -> Validation:
        """The best validation (the first of equals)."""
        return min(self.validations, key=lambda validation: validation.score)


def new_model(config: DecoderConfig, *, seed: int) -> Transformer:
    """A decoder whose parameters depend on the seed and on nothing drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(config)


def train(
    model: Trainable,
    train_tokens: Tokens,
    validation_ids: Int[Tensor, " M"],
    config: TrainConfig,
    *,
    on_step: Callable[[Progress], None] | None = None,
    on_validation: Callable[[Validation], None] | None = None,
    on_damaged: Callable[[str], None] = lambda sentence: None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoints: Checkpoints | None = None,
) -> TrainResult:
    """Train the model in place, on the device it is on.

    Windows are contiguous; incomplete windows and batches of the training text are left out,
    the validation text is read whole. With ``checkpoints`` the run goes on from the newest whole
    one, if there is any (``on_damaged`` is told of those that are not), to the same parameters
    that it would have reached in one go. ``should_stop`` is asked after each step; when it says
    yes, a checkpoint is written and the run ends unfinished.

    Started by torchrun or ``accelerate launch``, each process computes its share of every batch
    on the device that is its own, and makes all these calls; only rank 0 writes checkpoints. A
    yes of one process stops all. Sharded, the model is left in shards: see ``whole_model``.
    """
    processes = join(model.device)
    check_processes(config, processes)
    windows = TokenWindows(train_tokens, seq_len=config.seq_len)
    steps_an_epoch = len(windows) // config.batch_size
    if steps_an_epoch < 1:
        raise CorpusError(
            f"corpus: expected at least {config.seq_len * config.batch_size + 1} training tokens "
            f"({config.batch_size} x {config.seq_len} and one more), got {len(train_tokens)}"
        )
    total_steps = config.total_steps(steps_an_epoch)
    exit_loss = ExitLoss(model, config, total_steps=total_steps)
    weights = exit_loss.schedule.target
    if config.compile:
        if not isinstance(model, Transformer):
            raise ConfigError("compile: expected a native decoder with it, got another model")
        model.compile_blocks()
    module = distribute(exit_loss, config, processes)
    optimizer = make_optimizer(model, config, num_layers=model.num_layers)
    validations: list[Validation] = []
    done = 0
    if checkpoints:
        state, damaged = checkpoints.load_latest(model, optimizer, processes)
        for sentence in damaged:
            on_damaged(sentence)
        if state:
            done = state["step"]
            validations = [_validation(stored) for stored in state["validations"]]
    eval_every = config.eval_every or steps_an_epoch
    checkpoint_every = config.checkpoint_every or eval_every

    def save(step: int) -> None:
        if checkpoints:
            about = {"validations": [asdict(validation) for validation in validations]}
            checkpoints.save(step, model, optimizer, about, processes)

    if _stale(validations, config):  # it was stopped right there
        return TrainResult(step=done, validations=tuple(validations), finished=True)
    for step, indices in _order(windows, config, first=done + 1):
        if step > total_steps:
            break
        lr = set_learning_rate(optimizer, step, total_steps, config)
        loss, losses = _backward(module, windows, indices, step, config, processes)
        bad = [str(layer) for layer, part in losses.items() if not torch.isfinite(part)]
        if bad:
            save(step - 1)
            raise TrainingError(
                f"step {step}: expected a finite loss, got {float(loss)} (layer {', '.join(bad)}; "
                f"windows {int(indices[0])} to {int(indices[-1])} of the training text); "
                "the parameters before this step are kept"
            )
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        done = step
        epoch = (step - 1) // steps_an_epoch + 1
        if on_step:
            on_step(
                Progress(
                    step=step,
                    total_steps=total_steps,
                    epoch=epoch,
                    loss=loss,
                    losses=losses,
                    lr=lr,
                )
            )
        if step == total_steps or step % eval_every == 0:
            with callable_in_parts(module):
                found = validate(model, validation_ids, weights, config)
            score, exit_ppl = processes.from_main(found)
            if not math.isfinite(score):
                save(step)
                raise TrainingError(f"step {step}: expected a finite validation score, got {score}")
            best = min((seen.score for seen in validations), default=math.inf)
            latest = Validation(
                step=step, epoch=epoch, score=score, exit_ppl=exit_ppl, is_best=score < best
            )
            validations.append(latest)
            if on_validation:
                on_validation(latest)
        ended = step == total_steps or _stale(validations, config)
        stopped = processes.any(should_stop()) and not ended
        if step % checkpoint_every == 0 or ended or stopped:
            save(step)
        if ended or stopped:
            return TrainResult(step=step, validations=tuple(validations), finished=not stopped)
    return TrainResult(step=done, validations=tuple(validations), finished=True)


def _backward(
    module: nn.Module,
    windows: TokenWindows,
    indices: Tensor,
    step: int,
    config: TrainConfig,
    processes: Processes,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Forward and backward of this process's rows of a batch, in ``accumulate`` parts; the
    (loss, CE by layer) of the whole batch.
    """
    mine = processes.rows(len(indices))
    part_size = (mine.stop - mine.start) // config.accumulate
    share = part_size / (mine.stop - mine.start)
    total: Tensor | float = 0.0
    losses: dict[int, Tensor] = {}
    for start in range(mine.start, mine.stop, part_size):
        rows = slice(start, start + part_size)
        inputs, targets = (ids.to(processes.device) for ids in windows.batch(indices[rows]))
        with averaging(module, last=rows.stop == mine.stop):
            loss, parts = module(inputs, targets, step=step, rows=rows)
            (loss * share).backward()
        total = total + loss.detach() * share
        for layer, part in parts.items():
            losses[layer] = losses.get(layer, torch.zeros_like(part)) + part * share
    assert isinstance(total, Tensor)
    return processes.mean(total, losses)


def _order(
    windows: TokenWindows, config: TrainConfig, *, first: int
) -> Iterator[tuple[int, Tensor]]:
    """(step, the windows it reads), from step ``first`` on, without end."""
    steps_an_epoch = len(windows) // config.batch_size
    step = first
    for epoch in count((first - 1) // steps_an_epoch):
        chosen = batch_indices(
            len(windows),
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            shuffle=config.shuffle,
            start=step - 1 - epoch * steps_an_epoch,
        )
        for indices in chosen:
            yield step, indices
            step += 1


def _stale(validations: list[Validation], config: TrainConfig) -> bool:
    """Whether patience has run out: so many validations in a row without a new best."""
    if config.patience is None or not validations:
        return False
    since_best = 0
    for validation in validations:
        since_best = 0 if validation.is_best else since_best + 1
    return since_best > config.patience


def _validation(stored: dict[str, Any]) -> Validation:
    """A validation as ``asdict`` and JSON left it."""
    exit_ppl = {int(layer): ppl for layer, ppl in stored["exit_ppl"].items()}
    return Validation(**{**stored, "exit_ppl": exit_ppl})


def validate(
    model: EarlyExitModel,
    validation_ids: Int[Tensor, " M"],
    weights: LossWeights,
    config: TrainConfig,
) -> tuple[float, dict[int, float]]:
    """The score that the run minimises, and the PPL of every exit and weighted layer."""
    layers = sorted({*model.exit_layers, *weights})
    windows = batches(validation_ids, seq_len=config.seq_len, batch_size=config.batch_size)
    trace = collect_trace(model, windows, layers=layers)
    exit_ppl = {layer: trace.ppl(layer) for layer in layers}
    if config.select_at is None:
        score = sum(weight * math.log(exit_ppl[layer]) for layer, weight in weights.items())
    else:
        score = sweep(trace.at(model.exit_layers), [config.select_at])[0].ppl
    return score, exit_ppl
