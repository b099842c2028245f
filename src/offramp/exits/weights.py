"""Loss weights: how much each layer's cross-entropy counts in training.

A value is a mapping {layer: weight}, layers counted from 1; a layer that is not named has
weight zero, and one with weight zero costs nothing: its logits are never computed.
"""

import math
from collections.abc import Mapping, Sequence
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


def asymmetric_exits(alpha: float, *, exit_layers: Sequence[int], num_layers: int) -> LossWeights:
    """alpha x the mean of the early exits' CE + (1 - alpha) CE_L: ``asymmetric`` for several."""
    _check_alpha(alpha)
    early = [layer for layer in exit_layers if layer != num_layers]
    if not early:
        raise ConfigError("asymmetric_exits: expected an exit before the last layer, got none")
    weights = dict.fromkeys(early, alpha / len(early))
    return check_loss_weights({**weights, num_layers: 1.0 - alpha}, num_layers)


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


def linear(exit_layers: Sequence[int]) -> LossWeights:
    """Sum over the exits of i CE_i / sum of all i (CALM, Schuster et al. 2022; PABEE, Zhou 2020).

    i is the layer's number, as in both papers, whose exits are at every layer.
    """
    weights = {layer: float(layer) for layer in exit_layers}
    return normalized(check_loss_weights(weights, max(exit_layers)))


def free(exit_layer: int, num_layers: int) -> LossWeights:
    """(s CE_s + L CE_L) / (s + L) for a shallow exit s (FREE, Bae et al. 2023)."""
    check_loss_weights({exit_layer: 1.0}, num_layers)
    return linear((exit_layer, num_layers))


def ee_llm(
    early_weights: Sequence[float], *, exit_layers: Sequence[int], num_layers: int
) -> LossWeights:
    """CE_L + sum of w_i CE_i over the early exits (EE-LLM, Chen et al. 2024).

    One weight for each of ``exit_layers`` but the last layer. EE-LLM's scripts use 0.25 and 0.5
    at a quarter and half of the depth (1.3B), 0.1 and 0.2 (7B to 30B).
    """
    early = [layer for layer in exit_layers if layer != num_layers]
    if len(early_weights) != len(early):
        raise ConfigError(
            f"ee_llm: expected a weight for each exit layer but the last ({len(early)}), "
            f"got {len(early_weights)}"
        )
    weights = dict(zip(early, early_weights, strict=True))
    return check_loss_weights({**weights, num_layers: 1.0}, num_layers)


def layerskip(num_layers: int, e_scale: float) -> LossWeights:
    """LayerSkip's scale e (Elhoushi et al. 2024, section 4.1.2), before mask and normalisation.

    With l from 0: e(l) = e_scale x (0 + 1 + ... + l) below the last layer, and
    e(L - 1) = L - 1 + e_scale x (0 + 1 + ... + L - 2). So e(0) = 0: an exit after the first
    layer is never trained. A model of one layer, where all of e is 0, gets weight 1.
    """
    if not (math.isfinite(e_scale) and e_scale >= 0):
        raise ConfigError(f"layerskip: expected E_SCALE of at least 0, got {e_scale}")
    if num_layers == 1:
        return standard(num_layers)
    last = num_layers - 1
    weights = {below + 1: e_scale * below * (below + 1) / 2 for below in range(last)}
    weights[num_layers] = last + e_scale * (last - 1) * last / 2
    return check_loss_weights(weights, num_layers)


def normalized(weights: Mapping[int, float]) -> LossWeights:
    """The weights over their sum."""
    total = sum(weights.values())
    return {layer: weight / total for layer, weight in weights.items()}


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A whole exit configuration under one name."""

    alpha: float
    exit_layer: int
    threshold: float


RECOMMENDED = Recommendation(alpha=0.7, exit_layer=1, threshold=0.95)
"""The seed document's recommended configuration."""


def _asymmetric(alpha: float, *, exit_layers: Sequence[int], num_layers: int) -> LossWeights:
    return asymmetric(alpha, num_layers=num_layers, exit_layer=exit_layers[0])


def _asymmetric_deep_supervision(
    alpha: float, *, exit_layers: Sequence[int], num_layers: int
) -> LossWeights:
    return asymmetric_deep_supervision(alpha, num_layers=num_layers, exit_layer=exit_layers[0])


ALPHA_WEIGHTINGS = {
    "asymmetric": _asymmetric,
    "asymmetric_exits": asymmetric_exits,
    "asymmetric_deep_supervision": _asymmetric_deep_supervision,
}
"""The weightings whose alpha may change over the run."""

SPEC_HELP = (
    "standard, asymmetric:ALPHA, asymmetric_exits:ALPHA, deep_supervision, "
    "asymmetric_deep_supervision:ALPHA, free, "
    "ee_llm:WEIGHT:WEIGHT:... (one for each early exit), linear, layerskip:E_SCALE, "
    "recommended, or LAYER=WEIGHT,LAYER=WEIGHT,..."
)


def parse_loss_weights(spec: str, *, num_layers: int, exit_layers: tuple[int, ...]) -> LossWeights:
    """Loss weights from their written form (SPEC_HELP).

    The shallow exit of ``asymmetric``, ``asymmetric_deep_supervision`` and ``free`` is the first
    of ``exit_layers``; that of ``recommended`` is the document's, layer 1. ``ee_llm``,
    ``linear`` and ``asymmetric_exits`` weight all ``exit_layers``.
    """
    name, _, argument = spec.partition(":")
    first = exit_layers[0]
    if "=" in spec:
        pairs = parse_layer_pairs(spec, field="loss weights", value="WEIGHT")
        return check_loss_weights(pairs, num_layers)
    if name in ALPHA_WEIGHTINGS:
        _, alpha = written_alpha(spec)
        return ALPHA_WEIGHTINGS[name](alpha, num_layers=num_layers, exit_layers=exit_layers)
    if name == "ee_llm":
        expected = "ee_llm: expected ee_llm:WEIGHT:WEIGHT:..."
        early_weights = [number(part, expected) for part in argument.split(":")]
        return ee_llm(early_weights, exit_layers=exit_layers, num_layers=num_layers)
    if name == "layerskip":
        e_scale = number(argument, "layerskip: expected layerskip:E_SCALE")
        return layerskip(num_layers, e_scale)
    if spec == "recommended":
        return asymmetric(
            RECOMMENDED.alpha, num_layers=num_layers, exit_layer=RECOMMENDED.exit_layer
        )
    if spec == "standard":
        return standard(num_layers)
    if spec == "deep_supervision":
        return deep_supervision(num_layers)
    if spec == "free":
        return free(first, num_layers)
    if spec == "linear":
        return check_loss_weights(linear(exit_layers), num_layers)
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


def written_alpha(spec: str) -> tuple[str, float]:
    """The name and the alpha of one of ALPHA_WEIGHTINGS as written."""
    name, _, argument = spec.partition(":")
    return name, number(argument, f"{name}: expected {name}:ALPHA")


def parse_layer_pairs(text: str, *, field: str, value: str) -> dict[int, float]:
    """{layer: number} from LAYER=NUMBER,LAYER=NUMBER,...; the words are for the error message."""
    pairs: dict[int, float] = {}
    for pair in text.split(","):
        layer, _, factor = pair.partition("=")
        if not layer.strip().isdecimal():
            raise ConfigError(f"{field}: expected LAYER={value}, got {pair!r}")
        if int(layer) in pairs:
            raise ConfigError(f"{field}: expected each layer once, got layer {layer} twice")
        pairs[int(layer)] = number(factor, f"{field}: expected LAYER={value}")
    return pairs


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: expected a number from 0 to 1, got {alpha}")


def _ends(alpha: float, exit_layer: int, num_layers: int) -> LossWeights:
    if exit_layer == num_layers:
        return {num_layers: 1.0}
    return {exit_layer: alpha, num_layers: round(1.0 - alpha, 12)}


def number(text: str, expected: str) -> float:
    """The number that a text holds; ConfigError with what was expected where it holds none."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{expected}, a number, got {text!r}") from None
