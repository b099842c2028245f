"""Loss weights: how much each layer's cross-entropy (CE) counts in training.

The functions here are the formulas. How a user names them is in ``weightings``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from offramp.errors import ConfigError


@dataclass(frozen=True, eq=False, repr=False)
class LossWeights(Mapping[int, float]):
    """A read-only mapping {layer: weight}, layers counted from 1.

    A layer that is not in it has weight 0 and costs nothing: its logits are never computed.
    """

    pairs: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, weights: Mapping[int, float]) -> "LossWeights":
        """The same weights, in the same order."""
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
    """CE_L: the last layer only."""
    return LossWeights(((num_layers, 1.0),))


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
    return LossWeights.of(dict.fromkeys(range(1, num_layers + 1), 1.0 / num_layers))


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
    return LossWeights.of({layer: weight / total for layer, weight in weights.items()})


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """An alpha, its exit layer and a threshold that go together."""

    alpha: float
    exit_layer: int
    threshold: float


RECOMMENDED = Recommendation(alpha=0.7, exit_layer=1, threshold=0.95)
"""The seed document's recommended configuration."""


def check_loss_weights(weights: Mapping[int, float], num_layers: int) -> LossWeights:
    """The weights above 0, in ascending order of layers.

    Raises ConfigError for a layer that the model does not have, a weight that is negative or not
    finite, and where no weight is above 0.
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
