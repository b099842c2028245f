"""Loss weights: how much each layer's cross-entropy counts in training.

A value is a mapping {layer: weight}, layers counted from 1; a layer that is not named has
weight zero, and one with weight zero costs nothing: its logits are never computed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from offramp.errors import ConfigError

LossWeights = dict[int, float]


def standard(num_layers: int) -> LossWeights:
    """CE_L: the last layer only."""
    return {num_layers: 1.0}


def asymmetric(alpha: float, *, num_layers: int, exit_layer: int = 1) -> LossWeights:
    """alpha CE_e + (1 - alpha) CE_L, nothing in between (the seed document, Experiment 5).

    alpha 0.5 is the auxiliary loss of Elbayad et al. 2020.
    """
    _check_alpha(alpha)
    return check_loss_weights(_ends(alpha, exit_layer, num_layers), num_layers)


def deep_supervision(num_layers: int) -> LossWeights:
    """The mean of all layers' CE (Lee et al. 2015)."""
    return dict.fromkeys(range(1, num_layers + 1), 1.0 / num_layers)


def asymmetric_deep_supervision(
    alpha: float, *, num_layers: int, exit_layer: int = 1, middle: float = 1.0
) -> LossWeights:
    """alpha CE_e + middle x CE of every layer in between + (1 - alpha) CE_L.

    With exit layer 1 and middle 1 it is the seed document's Experiment 6.
    """
    between = dict.fromkeys(range(exit_layer + 1, num_layers), middle)
    _check_alpha(alpha)
    return check_loss_weights({**between, **_ends(alpha, exit_layer, num_layers)}, num_layers)


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A whole exit configuration under one name."""

    alpha: float
    exit_layer: int
    threshold: float


RECOMMENDED = Recommendation(alpha=0.7, exit_layer=1, threshold=0.95)
"""The seed document's recommended configuration."""

SPEC_HELP = (
    "standard, asymmetric:ALPHA, deep_supervision, asymmetric_deep_supervision:ALPHA, "
    "recommended, or LAYER=WEIGHT,LAYER=WEIGHT,..."
)


def parse_loss_weights(spec: str, *, num_layers: int, exit_layers: tuple[int, ...]) -> LossWeights:
    """Loss weights from their written form (SPEC_HELP).

    The shallow exit of ``asymmetric`` and ``asymmetric_deep_supervision`` is the first of
    ``exit_layers``; that of ``recommended`` is the document's, layer 1.
    """
    name, _, argument = spec.partition(":")
    first = exit_layers[0]
    if "=" in spec:
        return check_loss_weights(_parse_pairs(spec), num_layers)
    if name in ("asymmetric", "asymmetric_deep_supervision"):
        alpha = _number(argument, f"{name}: expected {name}:ALPHA")
        make = asymmetric if name == "asymmetric" else asymmetric_deep_supervision
        return make(alpha, num_layers=num_layers, exit_layer=first)
    if spec == "recommended":
        return asymmetric(
            RECOMMENDED.alpha, num_layers=num_layers, exit_layer=RECOMMENDED.exit_layer
        )
    if spec == "standard":
        return standard(num_layers)
    if spec == "deep_supervision":
        return deep_supervision(num_layers)
    raise ConfigError(f"loss weights: expected {SPEC_HELP}; got {spec!r}")


def check_loss_weights(weights: Mapping[int, float], num_layers: int) -> LossWeights:
    """The weights that are not zero, by layer; ConfigError where one cannot be used."""
    for layer, weight in weights.items():
        if not 1 <= layer <= num_layers:
            raise ConfigError(f"loss weights: expected layers from 1 to {num_layers}, got {layer}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(
                f"loss weights: expected weights of at least 0, got {weight} at layer {layer}"
            )
    kept = {layer: float(weights[layer]) for layer in sorted(weights) if weights[layer] > 0}
    if not kept:
        raise ConfigError("loss weights: expected at least one weight above 0, got none")
    return kept


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: expected a number from 0 to 1, got {alpha}")


def _ends(alpha: float, exit_layer: int, num_layers: int) -> LossWeights:
    if exit_layer == num_layers:
        return {num_layers: 1.0}
    return {exit_layer: alpha, num_layers: 1.0 - alpha}


def _parse_pairs(spec: str) -> LossWeights:
    weights: LossWeights = {}
    for pair in spec.split(","):
        layer, _, weight = pair.partition("=")
        if not layer.strip().isdecimal():
            raise ConfigError(f"loss weights: expected LAYER=WEIGHT, got {pair!r}")
        if int(layer) in weights:
            raise ConfigError(f"loss weights: expected each layer once, got layer {layer} twice")
        weights[int(layer)] = _number(weight, "loss weights: expected LAYER=WEIGHT")
    return weights


def _number(text: str, expected: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{expected}, a number, got {text!r}") from None
