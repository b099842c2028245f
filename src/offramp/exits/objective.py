"""The training objective as a config, and the checks of its fields.

``schedules`` computes the loss weights of each step from it.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from offramp.errors import ConfigError
from offramp.exits.weightings import (
    HELP,
    WEIGHTINGS,
    number,
    parse_layer_pairs,
    weighting_named_in,
)

AlphaSchedule = Literal["constant", "linear", "cosine", "step"]
WeightWarmup = Literal["none", "linear", "cosine"]
LayerDropoutSchedule = Literal["constant", "exponential"]

NEED_EARLY_EXITS = (
    "alpha_end",
    "weight_warmup",
    "curriculum",
    "gradient_equilibrium",
    "detach_exits",
    "distill",
    "backbone_steps",
)
"""The fields that have no effect if only the last layer has a weight."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The training objective. Schedules of the loss weights start after --backbone-steps."""

    loss_weights: str = field(default="asymmetric:0.7", metadata={"help": HELP})
    alpha_end: float | None = None
    "Final value of the ALPHA of the loss weights."
    alpha_schedule: AlphaSchedule = "constant"
    "How alpha changes: linear, cosine, or step (by equal parts after each of --alpha-steps)."
    alpha_steps: tuple[int, ...] = ()
    """For linear and cosine, the step at which alpha reaches its final value (default: the last).
    For step, the steps after which alpha changes, ascending."""
    weight_warmup: WeightWarmup = "none"
    "Increase the early exits' weights from 0: linear or cosine (EE-LLM)."
    weight_warmup_steps: int = 0
    "Number of steps until the early exits have their full weight."
    curriculum: str = "none"
    """Which early exits have a weight at a step (LayerSkip): none (all exits), rotational:R
    (every R-th layer, shifted up by one at each step), or gradual (from the last layer down; all
    exits after half of the run)."""
    layer_dropout: float = 0.0
    "Share of samples that skip the last layer; less for lower layers, 0 for the first (LayerSkip)."
    layer_dropout_schedule: LayerDropoutSchedule = "constant"
    "Layer dropout over the run: constant, or growing exponentially from 0."
    gradient_equilibrium: bool = False
    "Train each part of the trunk on the mean of the losses above it, not the sum (Li et al. 2019)."
    detach_exits: bool = False
    "Send no gradient of the early exits to the trunk; only the last layer's loss trains it."
    distill: float = 0.0
    "Weight of KL(last layer || exit), added to each early exit's cross-entropy."
    distill_temperature: float = 1.0
    "Temperature of both distributions in that KL."
    backbone_steps: int = 0
    "Number of steps with only the standard loss, before the joint objective."
    layer_lr: str = ""
    """Factors of the learning rate by layer: LAYER=FACTOR,... (0 is the embedding), or decay:F,
    which is F to the power of the number of layers above."""

    def __post_init__(self) -> None:
        _check_values(self)
        _check_pairs(self)
        weighting = weighting_named_in(self.loss_weights)
        if self.alpha_end is not None and not (weighting and weighting.takes_alpha):
            movable = [each.written for each in WEIGHTINGS.values() if each.takes_alpha]
            raise ConfigError(
                f"alpha_end: expected loss_weights {', '.join(movable[:-1])} or {movable[-1]}, "
                f"got loss_weights {self.loss_weights!r}"
            )
        if weighting and weighting.name == "standard":
            refuse_without_early_exits(self)
        if self.curriculum != "none" and not (weighting and weighting.over_all_layers):
            maskable = [each.name for each in WEIGHTINGS.values() if each.over_all_layers]
            raise ConfigError(
                f"curriculum: expected loss_weights over all layers "
                f"({', '.join(maskable)}), got loss_weights {self.loss_weights!r}"
            )
        if self.detach_exits and self.gradient_equilibrium:
            raise ConfigError(
                "detach_exits: expected gradient_equilibrium to be off, got both on; "
                "a detached exit sends no gradient to the trunk"
            )


def refuse_without_early_exits(config: ObjectiveConfig) -> None:
    """Raise a ConfigError if a field needs early exits; call it if the weights have none."""
    for name in NEED_EARLY_EXITS:
        if is_set(config, name):
            raise ConfigError(
                f"{name}: expected loss_weights with an early exit, got loss_weights "
                f"{config.loss_weights!r}, in which only the last layer has a weight"
            )


def is_set(config: ObjectiveConfig, name: str) -> bool:
    """Return whether a field differs from its default."""
    return bool(getattr(config, name) != getattr(type(config), name))


def layer_lr_factors(config: ObjectiveConfig, num_layers: int) -> dict[int, float]:
    """Return the learning rate factors of the embedding (0) and each layer; all others have 1.

    ``decay:F`` is discriminative fine-tuning (Howard & Ruder 2018, section 3.2): F^(L - l) at
    layer l; the paper uses F = 1 / 2.6.
    """
    written = _parse_layer_lr(config.layer_lr)
    if isinstance(written, float):
        return {layer: written ** (num_layers - layer) for layer in range(num_layers + 1)}
    for layer in written:
        if layer > num_layers:
            raise ConfigError(f"layer_lr: expected layers from 0 to {num_layers}, got {layer}")
    return {layer: written.get(layer, 1.0) for layer in range(num_layers + 1)}


def _parse_layer_lr(text: str) -> float | dict[int, float]:
    """Return the F of decay:F, or {layer: factor}."""
    name, _, factor = text.partition(":")
    if name == "decay":
        decay = number(factor, "layer_lr: expected decay:F")
        if not (math.isfinite(decay) and decay > 0):
            raise ConfigError(f"layer_lr: expected decay:F with F above 0, got {text!r}")
        return decay
    pairs = parse_layer_pairs(text, field="layer_lr", value="FACTOR") if text else {}
    for layer, value in pairs.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(
                f"layer_lr: expected factors of at least 0, got {value} at layer {layer}"
            )
    return pairs


def _check_values(config: ObjectiveConfig) -> None:
    """Check each field on its own."""
    for name, choices in (
        ("alpha_schedule", get_args(AlphaSchedule)),
        ("weight_warmup", get_args(WeightWarmup)),
        ("layer_dropout_schedule", get_args(LayerDropoutSchedule)),
    ):
        if getattr(config, name) not in choices:
            expected = " or ".join((", ".join(choices[:-1]), choices[-1]))
            raise ConfigError(f"{name}: expected {expected}, got {getattr(config, name)!r}")
    for name in ("weight_warmup_steps", "backbone_steps", "distill"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name}: expected at least 0, got {value}")
    if config.alpha_end is not None and not 0 <= config.alpha_end <= 1:
        raise ConfigError(f"alpha_end: expected a number from 0 to 1, got {config.alpha_end}")
    steps = config.alpha_steps
    if any(step < 1 for step in steps) or list(steps) != sorted(set(steps)):
        raise ConfigError(f"alpha_steps: expected ascending steps from 1, got {_written(steps)}")
    if not 0 <= config.layer_dropout < 1:
        raise ConfigError(
            f"layer_dropout: expected at least 0 and less than 1, got {config.layer_dropout}"
        )
    temperature = config.distill_temperature
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"distill_temperature: expected a number above 0, got {temperature}")
    if not re.fullmatch(r"none|gradual|rotational:0*[1-9][0-9]*", config.curriculum):
        raise ConfigError(
            "curriculum: expected none, rotational:R with a whole R of at least 1, or gradual, "
            f"got {config.curriculum!r}"
        )
    _parse_layer_lr(config.layer_lr)


def _check_pairs(config: ObjectiveConfig) -> None:
    """Check fields that need each other."""
    schedule, steps = config.alpha_schedule, config.alpha_steps
    if (config.alpha_end is None) != (schedule == "constant"):
        raise ConfigError(
            "alpha_end: expected both alpha_end and an alpha_schedule other than constant, or "
            f"neither, got alpha_end {config.alpha_end} and alpha_schedule {schedule!r}"
        )
    if schedule == "step" and not steps:
        raise ConfigError("alpha_steps: expected at least one step with alpha_schedule 'step'")
    if len(steps) > {"constant": 0, "step": len(steps)}.get(schedule, 1):
        most = "none" if schedule == "constant" else "at most one step"
        raise ConfigError(
            f"alpha_steps: expected {most} with alpha_schedule {schedule!r}, got {_written(steps)}"
        )
    if is_set(config, "weight_warmup") != is_set(config, "weight_warmup_steps"):
        raise ConfigError(
            "weight_warmup: expected both weight_warmup and weight_warmup_steps, or neither, got "
            f"{config.weight_warmup!r} and {config.weight_warmup_steps} steps"
        )
    for name, needed in (
        ("layer_dropout_schedule", "layer_dropout"),
        ("distill_temperature", "distill"),
    ):
        if is_set(config, name) and not is_set(config, needed):
            raise ConfigError(
                f"{name}: expected {needed} above 0 with it, got {name} {getattr(config, name)!r} "
                f"and {needed} 0"
            )


def _written(steps: tuple[int, ...]) -> str:
    return ",".join(map(str, steps))
