"""What a study is: recipes that are compared, on which model, for how long."""

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
    """One way of training: what it changes of the study's model and training."""

    label: str
    training: Mapping[str, Any] = field(default_factory=dict)
    "Fields of TrainConfig."
    model: Mapping[str, Any] = field(default_factory=dict)
    "Fields of DecoderConfig."
    specialise: SpecialiseConfig | None = None
    "After training, teach each exit the tokens that leave there."
    level: float | None = None
    "How much of what the study varies, where that is a number."
    tested: bool = True
    "Shown, but no claim is made of it: an end of a grid that leaves an exit untrained, say."


@dataclass(frozen=True, kw_only=True)
class GateFit:
    """How much a run's gates see; what is compared has the same."""

    tokens: int = 131_072
    "Of the training text, drawn at random."
    steps: int = 1000


@dataclass(frozen=True, kw_only=True)
class Study:
    """Recipes that are compared, and what they have in common."""

    name: str
    question: str
    tokenizer: str
    model: DecoderConfig
    "The vocabulary is set from the corpus."
    training: TrainConfig
    "But for the number of steps, which follows from ``tokens``, and the seed."
    tokens: int
    "Training tokens of each run, the last step's rest included."
    test_tokens: int
    "Tokens of the test text that are read, from its start."
    recipes: tuple[Recipe, ...]
    static_layers: tuple[int, ...]
    "Depths of the models without exits that stand beside them; the deepest is the standard."
    baseline: str | None = None
    "Label of the recipe that the others are compared with, beside the static models."
    measures: tuple[str, ...] = ("max_prob",)
    "Confidence by which tokens leave, a frontier for each; the first is the one to look at."
    gates: GateFit = GateFit()
    varies: str | None = None
    "What the recipes' levels are of; the trend of the last layer over them is tested."
    seed_findings: bool = False
    "Whether its recipes are those of the seed document's findings."
    compared_at: float = 65.0
    "flops_pct at which recipes are tested against static models."
    seeds: int = 3

    @property
    def shown_only(self) -> set[str]:
        """Labels of the recipes that no claim is made of."""
        return {recipe.label for recipe in self.recipes if not recipe.tested}
