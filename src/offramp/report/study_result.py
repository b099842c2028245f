"""What a study found, as values: the content of study.json and of timing.json.

Every ratio is of perplexities, ours divided by theirs, so one below 1 is better. None stands for
what is not known, such as the PPL at a cost that no policy of a model reaches. How the values are
stored is in ``study_json``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offramp.models.missing_kv import EXACT
from offramp.report.decoding_times import DecodingTimes

Number = float | None


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A PPL over the seeds."""

    mean: Number
    std: Number
    "Sample standard deviation; None for one seed."
    values: tuple[Number, ...]
    "One value a seed."

    def __str__(self) -> str:
        if self.mean is None:
            return "not known"
        return f"{self.mean:.3f}" + ("" if self.std is None else f" ± {self.std:.3f}")


@dataclass(frozen=True, kw_only=True)
class SpreadAt(Spread):
    """A PPL at one cost, over the seeds."""

    interval: tuple[float, float] | None
    "95% bootstrap interval over seeds and stretches of the test text."


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of two PPLs, paired seed by seed."""

    mean: Number
    "Geometric mean over the seeds."
    values: tuple[Number, ...]
    "One ratio a seed."
    interval: tuple[float, float] | None
    "95% bootstrap interval over seeds and stretches of the test text."
    p_value: Number
    "Two-sided paired t test on the log ratios; None for one seed."

    def __str__(self) -> str:
        return "not known" if self.mean is None else f"{self.mean:.3f}"


@dataclass(frozen=True, kw_only=True)
class TestedRatio(Ratio):
    """A ratio that a claim is made of."""

    __test__ = False  # pytest takes every class named Test... for tests

    p_holm: Number = None
    "``p_value`` after Holm's correction over the recipes; None where it makes no claim."


@dataclass(frozen=True, kw_only=True)
class StaticModel:
    """One trained model without exits."""

    layers: int
    source: int | None = None
    "The layer above which its blocks share keys and values; None: each block has its own."
    seed: int
    name: str
    "Its folder among the runs."
    compute_pct: float
    "Layers, in percent of the standard model's."
    flops_pct: float
    "FLOPs a token, in percent of the standard model's."
    ppl: float
    "On the test text."


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The policies of one model on the test text, as columns, in ascending cost."""

    threshold: tuple[float, ...]
    compute_pct: tuple[float, ...]
    flops_pct: tuple[float, ...]
    ppl: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RoutedModel:
    """One trained model with exits."""

    label: str
    "Label of its recipe."
    seed: int
    name: str
    "Its folder among the runs."
    config: Mapping[str, Any]
    "Everything that its figures depend on."
    exit_ppl: Mapping[int, float]
    "PPL on the test text where every token leaves at that layer."
    confidence: str
    "The study's first measure."
    frontier: Mapping[str, tuple[tuple[float, float, float], ...]]
    "Points (compute_pct, PPL, threshold) of that measure, by ``missing_kv``."
    frontiers: Mapping[str, Mapping[str, Curve]]
    "By measure and ``missing_kv``."

    def curve(self, confidence: str, missing_kv: str) -> Curve:
        """The frontier with that meaning of ``missing_kv``, or the exact one, which has both."""
        curves = self.frontiers[confidence]
        return curves[EXACT] if EXACT in curves else curves[missing_kv]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe over all seeds, by one measure and with one meaning of ``missing_kv``.

    Costs that are keys are flops_pct.
    """

    label: str
    confidence: str
    missing_kv: str
    loss_weights: str
    exit_ppl: Mapping[int, Spread]
    "By exit layer, the last one included."
    final_ppl: Spread
    "Of the last layer."
    ppl_at: Mapping[float, SpreadAt]
    compute_pct_at: Mapping[float, Number]
    ratio_to_static_at: Mapping[float, Ratio]
    "To static models of equal cost."
    ratio_to_standard_at: Mapping[float, Ratio]
    "To the standard model at 100%."
    final_to_standard: TestedRatio
    "The last layer to the standard model's."
    area: TestedRatio
    "To static models, of the mean log PPL over a range of costs."
    to_static: TestedRatio
    "To static models at the cost that the study compares at."
    to_baseline: TestedRatio | None = None
    "To the study's baseline at that cost; None where the study has no baseline."
    final_to_baseline: TestedRatio | None = None
    "The last layer to the baseline's."
    p_value: Number = None
    "``p_holm`` of ``to_static``."

    def __str__(self) -> str:
        at = ", ".join(f"{ppl} at {point:g}%" for point, ppl in self.ppl_at.items())
        return (
            f"{self.label} ({self.confidence}, {self.missing_kv}): PPL by share of FLOPs {at}; "
            f"ratio to static models {self.to_static}"
        )


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A recipe that ``offramp recipe`` tried."""

    question: str
    label: str
    held_out_ppl: Number
    "At the budget, on held-out training text; None where no policy keeps the budget."
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A whole study."""

    study: str
    question: str
    text: Mapping[str, Any]
    "Names and hashes of the texts, and how they were split."
    offramp_version: str
    search: tuple[Searched, ...] | None = None
    "What ``offramp recipe`` tried, in order; None for other studies."
    recipe: Mapping[str, Any] | None = None
    "What it found."
    train_tokens: int
    "Training tokens of each run."
    test_tokens: int
    seeds: tuple[int, ...]
    compared_at: float
    "flops_pct at which recipes are tested."
    area: tuple[float, float]
    "The range of flops_pct that an ``area`` covers."
    static: tuple[StaticModel, ...]
    runs: tuple[RoutedModel, ...]
    summary: tuple[Row, ...]
    answers: tuple[str, ...] = ()
    "What was found, in words."

    @property
    def rows(self) -> tuple[Row, ...]:
        """The table: a row for each recipe, measure and meaning of ``missing_kv``."""
        return self.summary

    def family(self, confidence: str, missing_kv: str) -> tuple[Row, ...]:
        """The recipes' rows by one measure and ``missing_kv``, in the study's order.

        An exact row belongs to every family of its measure: both meanings are the same there.
        """
        return tuple(
            row
            for row in self.summary
            if row.confidence == confidence and row.missing_kv in (missing_kv, EXACT)
        )

    @property
    def families(self) -> list[tuple[str, str]]:
        """(measure, ``missing_kv``) of the rows, the one to look at first, first.

        Exact rows are a family of their own only where there are no others.
        """
        found = list(dict.fromkeys((row.confidence, row.missing_kv) for row in self.summary))
        others = [family for family in found if family[1] != EXACT]
        return others or found

    @property
    def static_kinds(self) -> dict[tuple[int, int | None], list[StaticModel]]:
        """The static models, one a seed, by (layers, source): the plain ones, the deepest first,
        then those that share keys and values."""
        found: dict[tuple[int, int | None], list[StaticModel]] = {}
        for model in sorted(self.static, key=lambda model: (model.source or 0, -model.layers)):
            found.setdefault((model.layers, model.source), []).append(model)
        return found

    def plot(self) -> Any:
        """An Altair chart: PPL of each recipe's exit, routed, and of its last layer."""
        from offramp.report.study_plots import recipes

        return recipes(self)


@dataclass(frozen=True, kw_only=True)
class StaticTime:
    """How long a static model takes."""

    layers: int
    seconds_pct: float
    "Seconds of a pass, in percent of the standard model's."
    ppl: Number = None
    "Mean over the seeds; None until the models are trained."


@dataclass(frozen=True, kw_only=True)
class TimedPolicy:
    """A policy of a recipe, under ``propagate``."""

    seconds_pct: float
    "Seconds of a pass, in percent of the same model's full pass; median over the seeds."
    ppl: float
    "Mean over the seeds."


@dataclass(frozen=True, kw_only=True)
class RoutedTimes:
    """How long a recipe's models take by one measure."""

    label: str
    confidence: str
    points: tuple[TimedPolicy, ...]


@dataclass(frozen=True, kw_only=True)
class StudyTimes:
    """The time that a study took."""

    seconds: Mapping[str, float]
    "Seconds of all runs together, by part: train, specialise, evaluate."
    static: tuple[StaticTime, ...]
    "Empty where the static models were not timed: they are timed before the first run is trained."
    routed: tuple[RoutedTimes, ...]
    decoding: DecodingTimes | None = None
    "None where decoding was not timed: where the runs' weights are not there."
