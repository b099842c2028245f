"""The named weightings, and the parser of loss weights.

``WEIGHTINGS`` is the only list of the names. Help texts and error messages are made from it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from offramp.errors import ConfigError
from offramp.exits import weights
from offramp.exits.weights import RECOMMENDED, LossWeights, check_loss_weights


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """A named formula for loss weights."""

    name: str
    argument: str = ""
    """The argument after the name and a colon: empty, one number (``ALPHA``, ``E_SCALE``), or
    several separated by colons (``WEIGHT:WEIGHT:...``)."""
    formula: str
    "The loss as a formula. L is the last layer, e the first exit."
    source: str
    weights: Callable[..., LossWeights]
    "Called with the numbers of the argument and the keywords num_layers and exit_layers."
    over_all_layers: bool = False
    "Whether layers without an exit have weights too, so that a curriculum may mask some layers."
    normalized: bool = False
    "Whether the weights of a step are divided by their sum."

    @property
    def takes_alpha(self) -> bool:
        """Whether the argument is an alpha, which may change during the run."""
        return self.argument == "ALPHA"

    @property
    def written(self) -> str:
        """The written form of the weighting, such as ``asymmetric:ALPHA``."""
        return f"{self.name}:{self.argument}" if self.argument else self.name

    def numbers(self, argument: str) -> tuple[float, ...]:
        """Parse the numbers of an argument. Raises ConfigError if one is not a number."""
        parts = argument.split(":") if self.argument.endswith("...") else [argument]
        expected = f"{self.name}: expected {self.written}"
        return tuple(number(part, expected) for part in parts)


SEED = "the seed document"

_ALL = (
    Weighting(
        name="standard",
        formula="CE_L",
        source="a language model without early exits",
        weights=lambda num_layers, exit_layers: weights.standard(num_layers),
    ),
    Weighting(
        name="asymmetric",
        argument="ALPHA",
        formula="ALPHA CE_e + (1 - ALPHA) CE_L",
        source=f"{SEED}, Experiment 5; Elbayad et al. 2020 for ALPHA 0.5",
        weights=lambda alpha, num_layers, exit_layers: weights.asymmetric(
            alpha, num_layers=num_layers, exit_layer=exit_layers[0]
        ),
    ),
    Weighting(
        name="asymmetric_exits",
        argument="ALPHA",
        formula="ALPHA x the mean CE of the early exits + (1 - ALPHA) CE_L",
        source="asymmetric, for several early exits",
        weights=weights.asymmetric_exits,
    ),
    Weighting(
        name="deep_supervision",
        formula="the mean CE of all layers",
        source="Lee et al. 2015",
        weights=lambda num_layers, exit_layers: weights.deep_supervision(num_layers),
        over_all_layers=True,
    ),
    Weighting(
        name="asymmetric_deep_supervision",
        argument="ALPHA",
        formula="ALPHA CE_e + the CE of every layer in between + (1 - ALPHA) CE_L",
        source=f"{SEED}, Experiment 6",
        weights=lambda alpha, num_layers, exit_layers: weights.asymmetric_deep_supervision(
            alpha, num_layers=num_layers, exit_layer=exit_layers[0]
        ),
        over_all_layers=True,
    ),
    Weighting(
        name="free",
        formula="(e CE_e + L CE_L) / (e + L)",
        source="FREE, Bae et al. 2023",
        weights=lambda num_layers, exit_layers: weights.free(exit_layers[0], num_layers),
    ),
    Weighting(
        name="ee_llm",
        argument="WEIGHT:WEIGHT:...",
        formula="CE_L + WEIGHT x CE of each early exit, one WEIGHT for each",
        source="EE-LLM, Chen et al. 2024",
        weights=lambda *early, num_layers, exit_layers: weights.ee_llm(
            early, exit_layers=exit_layers, num_layers=num_layers
        ),
    ),
    Weighting(
        name="linear",
        formula="the mean CE of the exits, each weighted by its layer number",
        source="CALM, Schuster et al. 2022; PABEE, Zhou et al. 2020",
        weights=lambda num_layers, exit_layers: check_loss_weights(
            weights.linear(exit_layers), num_layers
        ),
        over_all_layers=True,
    ),
    Weighting(
        name="layerskip",
        argument="E_SCALE",
        formula="the mean CE of all layers, with weights that grow with depth by E_SCALE",
        source="LayerSkip, Elhoushi et al. 2024, section 4.1.2",
        weights=lambda e_scale, num_layers, exit_layers: weights.layerskip(num_layers, e_scale),
        over_all_layers=True,
        normalized=True,
    ),
    Weighting(
        name="recommended",
        formula=f"asymmetric:{RECOMMENDED.alpha} with its exit at layer {RECOMMENDED.exit_layer}",
        source=f"{SEED}, its recommended configuration",
        weights=lambda num_layers, exit_layers: weights.asymmetric(
            RECOMMENDED.alpha, num_layers=num_layers, exit_layer=RECOMMENDED.exit_layer
        ),
    ),
)

WEIGHTINGS = {weighting.name: weighting for weighting in _ALL}
"""The named weightings by name."""

BY_LAYER = "LAYER=WEIGHT,LAYER=WEIGHT,..."
"""The written form of weights by layer."""

FORMS = f"{', '.join(weighting.written for weighting in _ALL)}, or {BY_LAYER}"
"""All written forms, for messages."""

HELP = (
    "Weight of each layer's cross-entropy (CE); e is the first exit layer and L the last "
    f"layer: {'; '.join(f'{each.written} ({each.formula})' for each in _ALL)}; or "
    "LAYER=WEIGHT,LAYER=WEIGHT and so on."
)
"""All written forms with their formulas, for the help of a flag."""


@dataclass(frozen=True, kw_only=True)
class ParsedWeights:
    """Parsed loss weights, which ``weights`` applies to the shape of a model."""

    weighting: Weighting | None = None
    "The named weighting; None for weights by layer."
    numbers: tuple[float, ...] = ()
    "The numbers of the weighting's argument."
    pairs: tuple[tuple[int, float], ...] = ()
    "(layer, weight) pairs, if there is no named weighting."

    @property
    def alpha(self) -> float:
        """The alpha of the weighting, which must take one."""
        assert self.weighting is not None
        assert self.weighting.takes_alpha
        return self.numbers[0]

    def with_alpha(self, alpha: float) -> "ParsedWeights":
        """Return the same weighting with another alpha."""
        return replace(self, numbers=(alpha,))

    def weights(self, *, num_layers: int, exit_layers: tuple[int, ...]) -> LossWeights:
        """Return the weights for a model of this shape. Raises ConfigError if they do not fit.

        ``asymmetric``, ``asymmetric_deep_supervision`` and ``free`` use the first of
        ``exit_layers`` as their early exit, ``recommended`` uses ``RECOMMENDED.exit_layer``.
        ``ee_llm``, ``linear`` and ``asymmetric_exits`` weight all of ``exit_layers``.
        """
        if self.weighting is None:
            return check_loss_weights(dict(self.pairs), num_layers)
        return self.weighting.weights(*self.numbers, num_layers=num_layers, exit_layers=exit_layers)


def weighting_named_in(written: str) -> Weighting | None:
    """Return the named weighting in written loss weights; None if there is none of this name."""
    return WEIGHTINGS.get(written.partition(":")[0])


def read_loss_weights(written: str) -> ParsedWeights:
    """Parse loss weights in one of the written ``FORMS``. Raises ConfigError for other forms."""
    if "=" in written:
        pairs = parse_layer_pairs(written, field="loss weights", value="WEIGHT")
        return ParsedWeights(pairs=tuple(pairs.items()))
    weighting = weighting_named_in(written)
    if weighting is None or not (weighting.argument or written == weighting.name):
        raise ConfigError(f"loss weights: expected {FORMS}; got {written!r}")
    if not weighting.argument:
        return ParsedWeights(weighting=weighting)
    _, _, argument = written.partition(":")
    return ParsedWeights(weighting=weighting, numbers=weighting.numbers(argument))


def parse_loss_weights(
    written: str, *, num_layers: int, exit_layers: tuple[int, ...]
) -> LossWeights:
    """Parse loss weights for a model of this shape. Raises ConfigError if they do not fit."""
    return read_loss_weights(written).weights(num_layers=num_layers, exit_layers=exit_layers)


def parse_layer_pairs(text: str, *, field: str, value: str) -> dict[int, float]:
    """Parse LAYER=NUMBER,LAYER=NUMBER,...; ``field`` and ``value`` are names for messages."""
    pairs: dict[int, float] = {}
    for pair in text.split(","):
        layer, _, factor = pair.partition("=")
        if not layer.strip().isdecimal():
            raise ConfigError(f"{field}: expected LAYER={value}, got {pair!r}")
        if int(layer) in pairs:
            raise ConfigError(f"{field}: expected each layer once, got layer {layer} twice")
        pairs[int(layer)] = number(factor, f"{field}: expected LAYER={value}")
    return pairs


def number(text: str, expected: str) -> float:
    """Parse a number. Raises a ConfigError that begins with ``expected``."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{expected}, a number, got {text!r}") from None
