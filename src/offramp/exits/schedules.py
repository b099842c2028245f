"""Loss weights over a run: pure functions of the config and the step, counted from 1.

So a resumed run goes on exactly where it stopped.
"""

import math

from offramp.errors import ConfigError
from offramp.exits.objective import (
    ObjectiveConfig,
    is_set,
    layer_lr_factors,
    refuse_without_early_exits,
)
from offramp.exits.weights import (
    ALPHA_WEIGHTINGS,
    LossWeights,
    check_loss_weights,
    normalized,
    parse_loss_weights,
    standard,
    written_alpha,
)

_NEED_LAST_LAYER = {
    "weight_warmup": "nothing else has one at first",
    "curriculum": "no mask leaves it out",
    "distill": "it is the teacher",
}


def weights_at(
    config: ObjectiveConfig,
    step: int,
    total_steps: int,
    *,
    num_layers: int,
    exit_layers: tuple[int, ...],
) -> LossWeights:
    """The loss weights of a step of a run of so many; only those above zero.

    In this order: alpha's schedule, the early exits' warm-up, the curriculum's mask, and, for
    LayerSkip's scale and under a curriculum, the normalisation to a sum of 1.
    """
    assert step >= 1
    if step <= config.backbone_steps:
        return standard(num_layers)
    step, total_steps = step - config.backbone_steps, total_steps - config.backbone_steps
    moved = _alpha_moved(config, step, total_steps)
    weights = _unmasked(config, moved, num_layers=num_layers, exit_layers=exit_layers)
    grown = _weight_grown(config, step)
    kept = {
        layer: weight if layer == num_layers else weight * grown
        for layer, weight in weights.items()
        if layer == num_layers or _enabled(config, layer, step, total_steps, num_layers)
    }
    return _normalized(config, check_loss_weights(kept, num_layers))


def target_weights(
    config: ObjectiveConfig, *, num_layers: int, exit_layers: tuple[int, ...]
) -> LossWeights:
    """The loss weights that the schedules lead to: alpha arrived, warm-up done, nothing masked."""
    weights = _unmasked(config, 1.0, num_layers=num_layers, exit_layers=exit_layers)
    return _normalized(config, weights)


def weighted_layers(
    config: ObjectiveConfig, *, num_layers: int, exit_layers: tuple[int, ...]
) -> tuple[int, ...]:
    """Every layer that has a weight at some step of a run long enough, ascending."""
    layers = {num_layers} if config.backbone_steps else set()
    for moved in (0.0, 1.0):
        layers |= set(_unmasked(config, moved, num_layers=num_layers, exit_layers=exit_layers))
    return tuple(sorted(layers))


def check_objective(
    config: ObjectiveConfig, *, total_steps: int, num_layers: int, exit_layers: tuple[int, ...]
) -> None:
    """ConfigError where the objective does not fit the model or the run; call it before training.

    After it ``weights_at`` gives weights at every step.
    """
    tables = [
        _unmasked(config, moved, num_layers=num_layers, exit_layers=exit_layers)
        for moved in (0.0, 1.0)
    ]
    if all(set(weights) == {num_layers} for weights in tables):
        refuse_without_early_exits(config)
    for name, reason in _NEED_LAST_LAYER.items():
        if is_set(config, name) and any(num_layers not in weights for weights in tables):
            raise ConfigError(
                f"{name}: expected loss_weights (and alpha_end) that leave the last layer a "
                f"weight, as {reason}, got loss_weights {config.loss_weights!r}"
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


def _unmasked(
    config: ObjectiveConfig, moved: float, *, num_layers: int, exit_layers: tuple[int, ...]
) -> LossWeights:
    """The weights as written, alpha having gone ``moved`` (0 to 1) of its way."""
    if config.alpha_end is None:
        return parse_loss_weights(
            config.loss_weights, num_layers=num_layers, exit_layers=exit_layers
        )
    name, start = written_alpha(config.loss_weights)
    alpha = (1.0 - moved) * start + moved * config.alpha_end
    return ALPHA_WEIGHTINGS[name](alpha, num_layers=num_layers, exit_layers=exit_layers)


def _normalized(config: ObjectiveConfig, weights: LossWeights) -> LossWeights:
    layerskip = config.loss_weights.startswith("layerskip:")
    return normalized(weights) if layerskip or config.curriculum != "none" else weights


def _alpha_moved(config: ObjectiveConfig, step: int, total_steps: int) -> float:
    """Share of its way that alpha has gone: 0 at the first step, 1 once it arrived."""
    if config.alpha_schedule == "constant":
        return 0.0
    if config.alpha_schedule == "step":
        return sum(step > moves for moves in config.alpha_steps) / len(config.alpha_steps)
    arrival = config.alpha_steps[0] if config.alpha_steps else total_steps
    done = (step - 1) / (arrival - 1) if arrival > 1 else 1.0
    return _ramp(config.alpha_schedule, done)


def _weight_grown(config: ObjectiveConfig, step: int) -> float:
    """Share of their weight that the early exits have: 0 at the first step, as in EE-LLM."""
    if config.weight_warmup == "none":
        return 1.0
    return _ramp(config.weight_warmup, (step - 1) / config.weight_warmup_steps)


def _ramp(shape: str, done: float) -> float:
    """From 0 to 1 in a straight line, or as half a cosine."""
    done = min(1.0, done)
    return done if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))


def _enabled(
    config: ObjectiveConfig, layer: int, step: int, total_steps: int, num_layers: int
) -> bool:
    """Whether the curriculum lets an early exit count at a step (LayerSkip, section 4.1.2).

    Rotational: layers 1, 1 + R, ... at step 1, then 2, 2 + R, ...: each layer once in R steps.
    Gradual: one layer more every T / 2L steps, from the last one down.
    """
    if config.curriculum == "none":
        return True
    if config.curriculum == "gradual":
        return 2 * num_layers * (step - 1) >= (num_layers - layer + 1) * total_steps
    return (layer - step) % int(config.curriculum.partition(":")[2]) == 0
