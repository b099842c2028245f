"""What a study is: the recipes that it compares, on which model, for how many tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.models.native.config import DecoderConfig
from offramp.training.config import TrainConfig

STANDARD = "standard"
"""Label of the static model of full depth."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way of training: its changes to the study's model and training."""

    label: str
    training: Mapping[str, Any] = field(default_factory=dict)
    "Fields of TrainConfig that it changes."
    model: Mapping[str, Any] = field(default_factory=dict)
    "Fields of DecoderConfig that it changes."
    specialise: SpecialiseConfig | None = None
    "How to specialise the exits after training; None: they stay as trained."
    level: float | None = None
    "Value of what the study varies, where that is a number."
    tested: bool = True
    """Whether claims are made of it. One that only completes a picture, such as the end of a grid
    that leaves an exit untrained, is shown but not tested."""


@dataclass(frozen=True, kw_only=True)
class GateFit:
    """How a run's gates are fitted; the same for all runs of a study."""

    tokens: int = 131_072
    "Number of tokens, drawn at random from the training text."
    steps: int = 1000
    "Number of optimizer steps."


@dataclass(frozen=True, kw_only=True)
class Study:
    """Recipes to compare, and what they have in common."""

    name: str
    question: str
    "What the study is to answer, in a sentence."
    tokenizer: str
    model: DecoderConfig
    "The model of full depth; the vocabulary is set from the corpus."
    training: TrainConfig
    "How to train; the number of steps follows from ``tokens``, and each run has its seed."
    tokens: int
    "Training tokens of each run, rounded up to whole steps."
    test_tokens: int
    "Tokens of the test text that are read, from its start."
    recipes: tuple[Recipe, ...]
    static_layers: tuple[int, ...]
    "Depths of the models without exits to compare with; the deepest is the standard model."
    baseline: str | None = None
    "Label of the recipe that the others are compared with, in addition to the static models."
    measures: tuple[str, ...] = ("max_prob",)
    "Confidence measures by which tokens leave, with a frontier each; the first is shown first."
    gates: GateFit = GateFit()
    varies: str | None = None
    "Name of what the recipes' levels are values of; the trend over them is tested."
    seed_findings: bool = False
    "Whether its recipes include those of the seed document's findings, which are then tested."
    compared_at: float = 65.0
    "flops_pct at which recipes are tested against static models."
    decoding: bool = False
    "Whether its runs are chosen and compared by the cache that decodes; see StudyRun."
    shared_static: tuple[tuple[int, int], ...] = ()
    """(layers, source) of static models whose blocks above the source share keys and values. They
    stand beside the plain ones: an early-exit model is compared with the better of both."""
    shared_upper: int | None = None
    "Hidden units of those in the blocks that project no keys and values; None: as of all blocks."
    seeds: int = 3
    grid: Mapping[str, Any] | None = None
    "The content of the file that it comes from, with defaults; None: one of the built-in studies."

    @property
    def shown_only(self) -> set[str]:
        """Labels of the recipes of which no claim is made."""
        return {recipe.label for recipe in self.recipes if not recipe.tested}
