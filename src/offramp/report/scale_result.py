"""What the study ``scale`` found, as values: the content of its study.json.

Ratios are of perplexities, the early-exit model's divided by the static models', so one below 1
is better. How the values are stored is in ``study_json``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offramp.report.study_result import Number, Ratio, Spread

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Size:
    """The models of one size, over the seeds."""

    width: int
    layers: int
    parameters: int
    "Parameters of the standard model, which has no exits, embeddings counted."
    train_tokens: int
    "Training tokens of each model."
    tokens_per_parameter: float
    epochs: float
    "Passes over the training text."
    ppl: Spread
    "Of the early-exit model at the cost that the study compares at."
    static_ppl: Spread
    "Of static models of equal cost, interpolated between depths."
    standard_ppl: Spread
    "Of the standard model at full cost."
    to_static: Ratio
    "``ppl`` to ``static_ppl``."
    to_standard: Ratio
    "``ppl`` to ``standard_ppl``."
    runs: tuple[str, ...]
    "Names of the models' folders among the runs."

    def __str__(self) -> str:
        return f"{millions(self.parameters)} parameters: ratio to static models {self.to_static}"


@dataclass(frozen=True, kw_only=True)
class OnLine:
    """The fitted line at one number of parameters."""

    parameters: float
    ratio: float
    interval: Interval | None
    "95% interval of the line itself; None where too few models leave no spread to judge by."
    prediction: Interval | None
    "95% interval for the ratio of one more seed."


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Log ratio against log parameters: a line by ordinary least squares over all seeds."""

    models: int
    "Number of ratios that it is fitted to, one for each size and seed."
    change: float
    "Factor by which ten times the parameters change the ratio."
    interval: Interval | None
    "95% interval of ``change``, by Student's t."
    p_value: Number
    "Of no change, two-sided."
    curve: tuple[OnLine, ...]
    "The line from the smallest size to the extrapolated one."
    extrapolated: OnLine
    "The line far beyond the largest size: no measurement."


@dataclass(frozen=True, kw_only=True)
class ScaleResult:
    """The study ``scale``."""

    study: str
    question: str
    text: Mapping[str, Any]
    "Names and hashes of the texts, and how they were split."
    offramp_version: str
    test_tokens: int
    seeds: tuple[int, ...]
    compared_at: float
    "flops_pct, of the standard model of each size, at which the models are compared."
    confidence: str
    missing_kv: str
    sizes: tuple[Size, ...]
    "The sizes of which all runs are complete, the smallest first."
    missing: tuple[int, ...]
    "Widths that the study has, too, but whose runs are not complete."
    fit: Fit | None
    "None with fewer than two sizes."
    answers: tuple[str, ...] = ()
    "What was found, in words."

    @property
    def rows(self) -> tuple[Size, ...]:
        """The table: a row for each size."""
        return self.sizes

    def plot(self) -> Any:
        """An Altair chart: the ratio against the number of parameters, with the fitted line."""
        from offramp.report.scale_plot import ratios

        return ratios(self)


def millions(parameters: float) -> str:
    """A number of parameters in words, such as ``0.31M``."""
    count = parameters / 1e6
    return f"{count:.2f}M" if count < 10 else f"{count:.0f}M"
