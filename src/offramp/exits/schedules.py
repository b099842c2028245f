"""Loss weights over a run: a schedule is made once and then returns the weights of each step.

The weights of a step depend only on the config and the number of the step, so a resumed run
continues exactly where it stopped.
"""

import math
from dataclasses import dataclass

from offramp.errors import ConfigError
from offramp.exits.objective import (
    ObjectiveConfig,
    is_set,
    layer_lr_factors,
    refuse_without_early_exits,
)
from offramp.exits.weightings import ParsedWeights, read_loss_weights
from offramp.exits.weights import LossWeights, check_loss_weights, normalized, standard

_NEED_LAST_LAYER = {
    "weight_warmup": "no other layer has a weight at first",
    "curriculum": "no mask removes it",
    "distill": "it is the teacher",
}


@dataclass(frozen=True, kw_only=True)
class LossSchedule:
    """The loss weights of every step of a run, parsed and checked; ``loss_schedule`` makes one."""

    config: ObjectiveConfig
    written: ParsedWeights
    rotation: int
    "The R of the curriculum rotational:R; 0 for other curricula."
    total_steps: int
    num_layers: int
    exit_layers: tuple[int, ...]

    def at(self, step: int) -> LossWeights:
        """Return the loss weights above zero of a step, counted from 1.

        They are computed in this order: alpha's schedule, the warm-up of the early exits, the
        curriculum's mask and, for LayerSkip's scale and with a curriculum, the normalisation to
        a sum of 1.
        """
        assert step >= 1
        config, last = self.config, self.num_layers
        if step <= config.backbone_steps:
            return standard(last)
        step, total_steps = step - config.backbone_steps, self.total_steps - config.backbone_steps
        weights = self.unmasked(_alpha_moved(config, step, total_steps))
        grown = _weight_grown(config, step)
        kept = {
            layer: weight if layer == last else weight * grown
            for layer, weight in weights.items()
            if layer == last or self._enabled(layer, step, total_steps)
        }
        return self._normalized(check_loss_weights(kept, last))

    @property
    def target(self) -> LossWeights:
        """The weights with alpha at its final value, after the warm-up and without a mask."""
        return self._normalized(self.unmasked(1.0))

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that have a weight at some step of a sufficiently long run, ascending."""
        layers = {self.num_layers} if self.config.backbone_steps else set()
        for moved in (0.0, 1.0):
            layers |= set(self.unmasked(moved))
        return tuple(sorted(layers))

    def unmasked(self, moved: float) -> LossWeights:
        """Return the weights without a mask; alpha has made ``moved`` (0 to 1) of its change."""
        written = self.written
        if self.config.alpha_end is not None:
            alpha = (1.0 - moved) * written.alpha + moved * self.config.alpha_end
            written = written.with_alpha(alpha)
        return written.weights(num_layers=self.num_layers, exit_layers=self.exit_layers)

    def _normalized(self, weights: LossWeights) -> LossWeights:
        weighting = self.written.weighting
        always = weighting is not None and weighting.normalized
        return normalized(weights) if always or self.config.curriculum != "none" else weights

    def _enabled(self, layer: int, step: int, total_steps: int) -> bool:
        """Return whether an early exit has a weight at a step (LayerSkip, section 4.1.2).

        The rotational curriculum enables layers 1, 1 + R, ... at step 1, then 2, 2 + R, ..., so
        each layer has a weight once in R steps. The gradual curriculum enables one more layer
        every T / 2L steps, from the last one down.
        """
        if self.rotation:
            return (layer - step) % self.rotation == 0
        if self.config.curriculum == "gradual":
            last = self.num_layers
            return 2 * last * (step - 1) >= (last - layer + 1) * total_steps
        return True


def loss_schedule(
    config: ObjectiveConfig, *, total_steps: int, num_layers: int, exit_layers: tuple[int, ...]
) -> LossSchedule:
    """Make the schedule of a run of ``total_steps`` steps, for a model of this shape.

    Every step of the schedule has at least one weight. Raises ConfigError if the objective does
    not fit the model or the run.
    """
    kind, _, rotation = config.curriculum.partition(":")
    schedule = LossSchedule(
        config=config,
        written=read_loss_weights(config.loss_weights),
        rotation=int(rotation) if kind == "rotational" else 0,
        total_steps=total_steps,
        num_layers=num_layers,
        exit_layers=exit_layers,
    )
    tables = [schedule.unmasked(moved) for moved in (0.0, 1.0)]
    if all(set(weights) == {num_layers} for weights in tables):
        refuse_without_early_exits(config)
    for name, reason in _NEED_LAST_LAYER.items():
        if is_set(config, name) and any(num_layers not in weights for weights in tables):
            raise ConfigError(
                f"{name}: expected loss_weights (and alpha_end) with a weight for the last layer, "
                f"because {reason}, got loss_weights {config.loss_weights!r}"
            )
    linear_curriculum = config.curriculum != "none" and config.loss_weights == "linear"
    if linear_curriculum and len(exit_layers) < num_layers:
        raise ConfigError(
            f"curriculum: expected an exit at each of the {num_layers} layers with loss_weights "
            f"'linear', got exit layers {','.join(map(str, exit_layers))}"
        )
    if config.backbone_steps >= total_steps:
        raise ConfigError(
            f"backbone_steps: expected fewer than the {total_steps} steps of the run, "
            f"got {config.backbone_steps}"
        )
    layer_lr_factors(config, num_layers)
    return schedule


def _alpha_moved(config: ObjectiveConfig, step: int, total_steps: int) -> float:
    """Return the share of alpha's change at a step: 0 at the first step, 1 at its final value."""
    if config.alpha_schedule == "constant":
        return 0.0
    if config.alpha_schedule == "step":
        return sum(step > moves for moves in config.alpha_steps) / len(config.alpha_steps)
    arrival = config.alpha_steps[0] if config.alpha_steps else total_steps
    done = (step - 1) / (arrival - 1) if arrival > 1 else 1.0
    return _ramp(config.alpha_schedule, done)


def _weight_grown(config: ObjectiveConfig, step: int) -> float:
    """Return the share of their weight that the early exits have: 0 at step 1, as in EE-LLM."""
    if config.weight_warmup == "none":
        return 1.0
    return _ramp(config.weight_warmup, (step - 1) / config.weight_warmup_steps)


def _ramp(shape: str, done: float) -> float:
    """Return a value from 0 to 1 on a straight line or half a cosine."""
    done = min(1.0, done)
    return done if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))
