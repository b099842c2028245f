"""What the API says of an opened model."""

import time
from pathlib import Path

from offramp.errors import ConfigError
from offramp.exits.confidence import CONFIDENCE
from offramp.exits.default_confidence import default_confidence
from offramp.models.open import OpenedModel
from offramp.serving.config import ServeConfig
from offramp.serving.costs import Costs
from offramp.serving.values import Cap, ModelInfo


def model_info(
    opened: OpenedModel,
    config: ServeConfig,
    *,
    costs: Costs,
    capacity: int,
    chat: bool,
    cap: Cap | None,
) -> ModelInfo:
    """Return what the API says of a model; ``capacity`` is that of a slot."""
    model = opened.model
    exits = tuple(model.exit_layers)
    usable = usable_confidences(opened)
    default = default_confidence(opened.fitted, exits) if usable else None
    if cap is not None:
        usable, default = (cap.confidence,), cap.confidence
    flops = costs.by_exit(default) if default else {model.num_layers: 100.0}
    return ModelInfo(
        id=config.name or name_of(opened.name),
        created=int(time.time()),
        num_layers=model.num_layers,
        exit_layers=exits,
        exits_trained=opened.exits_trained,
        confidences=usable,
        default_confidence=default,
        flops_pct={layer: round(pct, 3) for layer, pct in flops.items()},
        max_tokens=min(config.max_new_tokens, capacity),
        capacity=capacity,
        vocab_size=model.vocab_size,
        most_prompts=config.slots + config.waiting,
        chat=chat,
        certificate=cap,
    )


def name_of(model: str) -> str:
    """Return the name of a model in the API: that of its folder, or what it is called."""
    path = Path(model)
    return (path.resolve().name or model) if path.exists() else model


def usable_confidences(opened: OpenedModel) -> tuple[str, ...]:
    """Return the confidence measures that decide exits of this model; none without exits."""
    early = opened.model.exit_layers[:-1]
    found = []
    for name, measure in CONFIDENCE.items() if early else ():
        try:
            for layer in early if measure.needs_gate else ():
                opened.fitted.gate(name, layer)
        except ConfigError:
            continue
        found.append(name)
    return tuple(found)
