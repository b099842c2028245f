"""Loss weights: the weight of each layer's cross-entropy (CE) in training.

The functions here are the formulas; ``weightings`` gives them names.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from offramp.errors import ConfigError


@dataclass(frozen=True, eq=False, repr=False)
class LossWeights(Mapping[int, float]):
    """A read-only mapping {layer: weight}, with layers counted from 1.

    A layer that is not in it has weight 0 and costs nothing: its logits are never computed.
    """

    pairs: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, weights: Mapping[int, float]) -> "LossWeights":
        """Make loss weights from a mapping, in the same order."""
        return cls(tuple(weights.items()))

    def __getitem__(self, layer: int) -> float:
        return dict(self.pairs)[layer]

    def __iter__(self) -> Iterator[int]:
        return iter([layer for layer, _ in self.pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"LossWeights({dict(self.pairs)})"


def standard(num_layers: int) -> LossWeights:
    """Return the weights of CE_L: only the last layer has a weight."""
    return LossWeights(((num_layers, 1.0),))


def asymmetric(alpha: float, *, num_layers: int, exit_layer: int = 1) -> LossWeights:
    """Return the weights of alpha CE_e + (1 - alpha) CE_L (the seed document, Experiment 5).

    With alpha 0.5 it is the auxiliary loss of Elbayad et al. 2020.
    """
    _check_alpha(alpha)
    return check_loss_weights(_ends(alpha, exit_layer, num_layers), num_layers)


def asymmetric_exits(alpha: float, *, exit_layers: Sequence[int], num_layers: int) -> LossWeights:
    """Return the weights of alpha x the mean CE of the early exits + (1 - alpha) CE_L."""
    _check_alpha(alpha)
    early = [layer for layer in exit_layers if layer != num_layers]
    if not early:
        raise ConfigError("asymmetric_exits: expected an exit before the last layer, got none")
    weights = dict.fromkeys(early, alpha / len(early))
    return check_loss_weights({**weights, num_layers: 1.0 - alpha}, num_layers)


def deep_supervision(num_layers: int) -> LossWeights:
    """Return the weights of the mean CE of all layers (Lee et al. 2015)."""
    return LossWeights.of(dict.fromkeys(range(1, num_layers + 1), 1.0 / num_layers))


def asymmetric_deep_supervision(
    alpha: float, *, num_layers: int, exit_layer: int = 1, middle: float = 1.0
) -> LossWeights:
    """Return the weights of alpha CE_e + middle x the CE of each layer between + (1 - alpha) CE_L.

    With exit layer 1 and middle 1 it is Experiment 6 of the seed document.
    """
    between = dict.fromkeys(range(exit_layer + 1, num_layers), middle)
    _check_alpha(alpha)
    return check_loss_weights({**between, **_ends(alpha, exit_layer, num_layers)}, num_layers)


def linear(exit_layers: Sequence[int]) -> LossWeights:
    """Return the weights of sum(i CE_i) / sum(i) over the exits i, by layer number.

    Source: CALM (Schuster et al. 2022) and PABEE (Zhou et al. 2020), with an exit at every layer.
    """
    weights = {layer: float(layer) for layer in exit_layers}
    return normalized(check_loss_weights(weights, max(exit_layers)))


def free(exit_layer: int, num_layers: int) -> LossWeights:
    """Return the weights of (s CE_s + L CE_L) / (s + L) for a shallow exit s (FREE, Bae 2023)."""
    check_loss_weights({exit_layer: 1.0}, num_layers)
    return linear((exit_layer, num_layers))


def ee_llm(
    early_weights: Sequence[float], *, exit_layers: Sequence[int], num_layers: int
) -> LossWeights:
    """Return the weights of CE_L + the sum of w_i CE_i over the early exits (EE-LLM, Chen 2024).

    ``early_weights`` holds one weight for each of ``exit_layers`` but the last layer. EE-LLM's
    scripts use 0.25 and 0.5 at a quarter and half of the depth (1.3B), 0.1 and 0.2 (7B to 30B).
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
    """Return LayerSkip's scale e (Elhoushi et al. 2024, section 4.1.2), not masked or normalised.

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
    """Divide the weights by their sum."""
    total = sum(weights.values())
    return LossWeights.of({layer: weight / total for layer, weight in weights.items()})


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A recommended combination of alpha, exit layer and threshold."""

    alpha: float
    exit_layer: int
    threshold: float


RECOMMENDED = Recommendation(alpha=0.7, exit_layer=1, threshold=0.95)
"""The seed document's recommended configuration."""


def check_loss_weights(weights: Mapping[int, float], num_layers: int) -> LossWeights:
    """Return the weights above 0, in ascending order of layers.

    Raises ConfigError for a layer that the model does not have, for a weight that is negative or
    not finite, and if no weight is above 0.
    """
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
    return LossWeights.of(kept)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: expected a number from 0 to 1, got {alpha}")


def _ends(alpha: float, exit_layer: int, num_layers: int) -> dict[int, float]:
    if exit_layer == num_layers:
        return {num_layers: 1.0}
    return {exit_layer: alpha, num_layers: round(1.0 - alpha, 12)}
