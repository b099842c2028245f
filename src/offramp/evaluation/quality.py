"""How well a confidence measure separates right from wrong predictions of an exit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from offramp.errors import ConfigError
from offramp.evaluation.cost import ModelCost
from offramp.evaluation.sweep import SweepRow, sweep
from offramp.evaluation.trace import ExitTrace
from offramp.exits.confidence import confidence_named

Scores = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class RiskCoverage:
    """The error rate among the tokens with the highest scores, for every share of the tokens."""

    coverage: NDArray[np.float64]
    "(N,) Share of the tokens, from 1 / N to 1."
    risk: NDArray[np.float64]
    "(N,) Mean loss of that share of the tokens, those with the highest scores."

    @property
    def area(self) -> float:
        """AURC, the mean risk over coverages (Geifman & El-Yaniv 2017); smaller is better."""
        return float(self.risk.mean())


def risk_coverage(scores: Scores, losses: NDArray[Any]) -> RiskCoverage:
    """Return the risk-coverage curve of a score; ``losses`` (N,) may be any numbers.

    Tokens with equal scores have no order: each counts with the mean loss of all of them.
    """
    if not len(scores):
        raise ConfigError("risk_coverage: expected at least one token, got none")
    order = np.argsort(-scores, kind="stable")
    _, group = np.unique(-scores[order], return_inverse=True)
    sums = np.bincount(group, weights=losses[order].astype(np.float64))
    ordered = (sums / np.bincount(group))[group]
    count = np.arange(1, len(scores) + 1)
    return RiskCoverage(coverage=count / len(scores), risk=np.cumsum(ordered) / count)


def auroc(scores: Scores, right: NDArray[np.bool_]) -> float:
    """Return the probability that a right token scores above a wrong one; ties count half.

    It is NaN if all tokens are right or all are wrong.
    """
    positive = int(np.count_nonzero(right))
    negative = len(right) - positive
    if not (positive and negative):
        return math.nan
    ranks = rankdata(scores)  # the mean rank where scores are equal
    return float((ranks[right].sum() - positive * (positive + 1) / 2) / positive / negative)


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Predicted probability against observed frequency, in bins of equal width."""

    count: NDArray[np.int64]
    "(bins,) Number of tokens."
    confidence: NDArray[np.float64]
    "(bins,) Mean score; NaN in an empty bin."
    accuracy: NDArray[np.float64]
    "(bins,) Share of right tokens; NaN in an empty bin."

    @property
    def ece(self) -> float:
        """Expected calibration error (Naeini et al. 2015): the mean gap, weighted by tokens."""
        gaps = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float(np.average(gaps, weights=self.count))


def reliability(scores: Scores, right: NDArray[np.bool_], *, bins: int = 15) -> Reliability:
    """Compare scores with observed frequencies in equal bins over [0, 1].

    A score on an edge belongs to the bin above it; a score of 1 belongs to the last bin.
    """
    if not len(scores):
        raise ConfigError("reliability: expected at least one token, got none")
    index = np.clip((scores.astype(np.float64) * bins).astype(np.int64), 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(index, weights=scores, minlength=bins) / count
        true = np.bincount(index, weights=right, minlength=bins) / count
    return Reliability(count=count, confidence=mean, accuracy=true)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The quality of a measure at one exit."""

    confidence: str
    exit_layer: int
    agreement: float
    "Share of tokens for which the exit predicts the same token as the last layer."
    aurc: float
    "Area under risk and coverage; the risk is disagreement with the last layer."
    auroc: float
    "AUROC of the score as a predictor of agreement with the last layer."
    curve: RiskCoverage
    reliability: Reliability | None
    "Reliability against agreement; None if the score is not a probability."
    reliability_target: Reliability | None
    "Reliability against the target, which temperature scaling improves."


def quality(trace: ExitTrace, confidence: str) -> list[Quality]:
    """Return the quality of a measure at each exit but the last.

    Raises ConfigError if the last exit of the trace is not the model's last layer.
    """
    if trace.exit_layers[-1] != trace.num_layers:
        raise ConfigError(
            f"exit layers: expected the last layer, {trace.num_layers}, among the trace's, "
            f"got {trace.exit_layers}"
        )
    found = []
    for row, layer in enumerate(trace.exit_layers[:-1]):
        scores = trace.scores(confidence)[row]
        agrees = trace.argmax[row] == trace.argmax[-1]
        curve = risk_coverage(scores, ~agrees)
        agreement = of_target = None
        if confidence_named(confidence).is_probability:
            agreement = reliability(scores, agrees)
            of_target = reliability(scores, trace.argmax[row] == trace.targets)
        found.append(
            Quality(
                confidence=confidence,
                exit_layer=layer,
                agreement=float(agrees.mean()),
                aurc=curve.area,
                auroc=auroc(scores, agrees),
                curve=curve,
                reliability=agreement,
                reliability_target=of_target,
            )
        )
    return found


def frontier(
    trace: ExitTrace,
    confidence: str,
    *,
    cost: ModelCost | None = None,
    shares: Sequence[float] = tuple(np.linspace(0.0, 1.0, 21)),
) -> list[SweepRow]:
    """Return PPL and cost for each share of the tokens whose scores reach the threshold.

    The threshold of each exit is that quantile of its scores. Share 0 is the full model, in which
    no exit is evaluated; share 1 is the first exit.
    """
    scores = trace.scores(confidence)[:-1]
    thresholds: list[tuple[float, ...]] = []
    for share in shares:
        if not 0 <= share <= 1:
            raise ConfigError(f"shares: expected numbers from 0 to 1, got {share}")
        if share in (0.0, 1.0):
            threshold = math.inf if share == 0.0 else -math.inf
            thresholds.append((threshold,) * len(scores))
        else:
            cut = np.quantile(scores, 1.0 - share, axis=1, method="higher")
            thresholds.append(tuple(float(value) for value in cut))
    return sweep(trace, thresholds, confidence=confidence, cost=cost)
