"""Training a native decoder with any loss weights."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from offramp.data import batches
from offramp.errors import ConfigError, CorpusError, TrainingError
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import collect_trace
from offramp.exits.loss import head_parameters, weighted_exit_loss
from offramp.exits.weights import LossWeights, parse_loss_weights
from offramp.models.base import EarlyExitModel, states_at, whole_step
from offramp.models.transformer import DecoderConfig, Transformer

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Lengths are in steps (optimizer updates) or epochs (passes over the text)."""

    loss_weights: str = "asymmetric:0.7"
    """standard, asymmetric:ALPHA, deep_supervision, asymmetric_deep_supervision:ALPHA,
    recommended, or LAYER=WEIGHT,..."""
    steps: int | None = None
    "Number of steps; without it, --epochs counts."
    epochs: int = 1
    "Passes over the training text."
    seq_len: int = 128
    "Tokens a window."
    batch_size: int = 32
    "Windows a step."
    lr: float = 1e-3
    "Peak learning rate of AdamW."
    weight_decay: float = 0.01
    "AdamW's weight decay."
    warmup_steps: int = 0
    "Steps of linear warm-up."
    schedule: Schedule = "constant"
    "Learning rate after the warm-up: constant, or cosine to zero."
    grad_clip: float = 1.0
    "Largest norm of the gradient."
    eval_every: int | None = None
    "Validate every so many steps (default: after each epoch and at the end)."
    patience: int | None = None
    "Stop after more than this many validations in a row without a new best (default: never)."
    select_at: float | None = None
    "Validate by the PPL routed at this threshold; without it by the weighted loss."
    shuffle: bool = True
    "Read the windows in a new random order each epoch."
    seed: int = 0
    "Seed of the parameters and of the order."

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "seq_len", "batch_size", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a number above 0, got {value}")
        for name in ("warmup_steps", "weight_decay", "patience", "seed"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: expected at least 0, got {value}")
        if self.schedule not in get_args(Schedule):
            raise ConfigError(f"schedule: expected constant or cosine, got {self.schedule!r}")
        if self.select_at is not None and math.isnan(self.select_at):
            raise ConfigError("select_at: expected a number, got nan")


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

    validations: tuple[Validation, ...]
    best_state: dict[str, Tensor]
    "The parameters at the best validation."

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
    model: Transformer,
    train_ids: Int[Tensor, " N"],
    validation_ids: Int[Tensor, " M"],
    config: TrainConfig,
    *,
    on_step: Callable[[Progress], None] | None = None,
    on_validation: Callable[[Validation], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train the model in place, on the device it is on.

    Windows are contiguous; incomplete windows and batches of the training text are left out,
    the validation text is read whole. ``should_stop`` is asked after each step; when it says
    yes, the run validates once more and ends.
    """
    device = next(model.parameters()).device
    weights = parse_loss_weights(
        config.loss_weights, num_layers=model.num_layers, exit_layers=model.exit_layers
    )
    tokens_a_step = config.seq_len * config.batch_size
    steps_an_epoch = (len(train_ids) - 1) // config.seq_len // config.batch_size
    if steps_an_epoch < 1:
        raise CorpusError(
            f"corpus: expected at least {tokens_a_step + 1} training tokens "
            f"({config.batch_size} x {config.seq_len} and one more), got {len(train_ids)}"
        )
    total_steps = config.steps or config.epochs * steps_an_epoch
    eval_every = config.eval_every or steps_an_epoch
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    exit_loss = ExitLoss(model, weights)
    validations: list[Validation] = []
    best_state: dict[str, Tensor] = {}
    best_score, since_best = math.inf, 0
    for step, (inputs, targets) in enumerate(_endless(train_ids, config), start=1):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate_factor(step, total_steps, config)
        loss, losses = exit_loss(inputs.to(device), targets.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        epoch = (step - 1) // steps_an_epoch + 1
        if on_step:
            on_step(
                Progress(
                    step=step,
                    total_steps=total_steps,
                    epoch=epoch,
                    loss=loss.detach(),
                    losses=losses,
                )
            )
        last = step == total_steps or should_stop()
        if not last and step % eval_every:
            continue
        score, exit_ppl = validate(model, validation_ids, weights, config)
        if not math.isfinite(score):
            raise TrainingError(f"step {step}: expected a finite validation score, got {score}")
        is_best = score < best_score
        since_best = 0 if is_best else since_best + 1
        validations.append(
            Validation(step=step, epoch=epoch, score=score, exit_ppl=exit_ppl, is_best=is_best)
        )
        if is_best:
            best_score = score
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        if on_validation:
            on_validation(validations[-1])
        if last or (config.patience is not None and since_best > config.patience):
            break
    return TrainResult(validations=tuple(validations), best_state=best_state)


class ExitLoss(nn.Module):
    """The weighted loss of a batch as a module: inputs and targets in, loss out.

    Only the weighted layers' logits are computed, and no block above the last of them runs.
    """

    def __init__(self, model: Transformer, weights: LossWeights) -> None:
        super().__init__()
        self.model = model
        self.weights = weights
        self.heads = head_parameters(
            model.unembed,
            weights,
            dict(model.named_parameters()),
            hidden_size=model.config.hidden_size,
        )

    def forward(
        self, inputs: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The loss, and its parts by layer, detached."""
        states = dict(states_at(self.model, inputs, self.weights, step=whole_step(inputs)))
        parameters = dict(self.model.named_parameters())
        return weighted_exit_loss(
            states,
            self.model.unembed,
            targets,
            self.weights,
            [parameters[name] for name in self.heads],
            vocab_size=self.model.config.vocab_size,
        )


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


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step (from 1): linear warm-up, then the schedule."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def _endless(ids: Tensor, config: TrainConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches, epoch after epoch."""
    order = torch.Generator().manual_seed(config.seed)
    while True:
        yield from batches(
            ids,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            drop_last=True,
            order=order if config.shuffle else None,
        )
