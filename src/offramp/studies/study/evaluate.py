"""Evaluation of a trained model of a study: its frontiers on held-out and on test text.

Thresholds are quantiles of the confidence on the held-out training text, so nothing is chosen on
the test text. Gates are fitted to the training text.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from offramp.calibration.fitting import fit_exits
from offramp.data import batches
from offramp.evaluation.cost import ModelCost, model_cost
from offramp.evaluation.routed import RoutedTrace, collect_routed
from offramp.evaluation.trace import ExitTrace, collect_trace
from offramp.exits.confidence import confidence_named
from offramp.exits.gate import NOTHING_FITTED, FittedExits, GateConfig
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.models.base import EarlyExitModel
from offramp.models.missing_kv import EXACT, complete
from offramp.studies.study.frontier import (
    Frontier,
    FrontierKey,
    TextName,
    full_depth,
    join,
    routed,
    traced,
)
from offramp.studies.study.plan import GateFit

SHARES = np.linspace(0.0, 1.0, 41)[1:-1]
"""Shares of the held-out tokens that leave at the first exit, one for each policy."""
PROPAGATED_AT = (0.15, 0.35, 0.55, 0.75, 0.9)
"""The shares under ``propagate``, where each policy takes a pass of its own."""
DECODED_AT = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
"""These shares instead, for a run whose figures are chosen by the cache that decodes."""
BATCH = 32

Texts = Mapping[TextName, Int[Tensor, " N"]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one model."""

    exit_ppl: dict[int, float]
    "PPL on the test text where every token leaves at that layer."
    full_flops: float
    "FLOPs of a token in the full model with one head."
    gate_flops: dict[str, float]
    "FLOPs of a token in the cheapest gate, by the gates' kind."
    frontiers: dict[FrontierKey, Frontier]
    "A model without early exits has only those of full depth."
    fitted: FittedExits
    "The gates that were fitted for the measures."
    full_pass: float
    "Seconds of a pass over the test text at full depth."
    routed_passes: dict[str, list[float]]
    """By measure, seconds of a pass with each policy of the frontier under ``propagate``; its two
    ends take no pass of their own."""


def evaluate(
    model: EarlyExitModel,
    train_ids: Int[Tensor, " N"],
    texts: Texts,
    *,
    measures: Sequence[str],
    gates: GateFit,
    seq_len: int,
    seed: int,
    decoding: bool = False,
) -> Evaluation:
    """Trace and route a model on ``texts``, the held-out one and the test one.

    A model whose early exits are all complete has frontiers with ``missing_kv`` "exact", which one
    pass gives. Other models have "recompute" and, by a pass for each policy, "propagate".
    ``decoding``: see StudyRun.
    """
    measures = measures if len(model.exit_layers) > 1 else ()
    fitted = _fit_gates(model, train_ids, measures, gates, seq_len=seq_len, seed=seed)
    cost = model_cost(model, context=(seq_len + 1) / 2, fitted=fitted)
    traces = {
        name: collect_trace(model, _windows(ids, seq_len), measures=measures, fitted=fitted)
        for name, ids in texts.items()
    }
    full_pass = full_pass_seconds(model, _windows(texts["test"], seq_len))
    frontiers = {full_depth(name): _full_depth(trace) for name, trace in traces.items()}
    routed_passes: dict[str, list[float]] = {}
    exact = complete(model)
    for place, measure in enumerate(measures):
        by = _Measured(
            model=model, measure=measure, cost=cost, fitted=fitted, traces=traces, seq_len=seq_len
        )
        for name in texts:
            key = FrontierKey(
                text=name, confidence=measure, missing_kv=EXACT if exact else "recompute"
            )
            frontiers[key] = by.traced(name)
        if exact:
            continue
        named: list[TextName] = ["held_out", "test"] if decoding and place == 0 else ["test"]
        for name in named:
            key = FrontierKey(text=name, confidence=measure, missing_kv="propagate")
            frontiers[key], routed_passes[measure] = by.routed(name, texts[name], decoding=decoding)
    return Evaluation(
        exit_ppl={layer: traces["test"].ppl(layer) for layer in model.exit_layers},
        full_flops=cost.full,
        gate_flops={kind: min(by.values()) for kind, by in cost.gates.items()},
        frontiers={  # only the test text is resampled
            key: frontier if key.text == "test" else frontier.whole()
            for key, frontier in frontiers.items()
        },
        fitted=fitted,
        full_pass=full_pass,
        routed_passes=routed_passes,
    )


def _windows(ids: Int[Tensor, " N"], seq_len: int, order: torch.Generator | None = None) -> Any:
    return batches(ids, seq_len=seq_len, batch_size=BATCH, order=order)


def _fit_gates(
    model: EarlyExitModel,
    train_ids: Int[Tensor, " N"],
    measures: Sequence[str],
    gates: GateFit,
    *,
    seq_len: int,
    seed: int,
) -> FittedExits:
    """The gates of the measures that need one, fitted to a random sample of the training text."""
    kinds = [name for name in measures if confidence_named(name).needs_gate]
    if not kinds:
        return NOTHING_FITTED
    return fit_exits(
        model,
        _windows(train_ids, seq_len, torch.Generator().manual_seed(seed)),
        kinds=kinds,
        max_tokens=gates.tokens,
        config=GateConfig(seed=seed, steps=gates.steps),
    )


def _full_depth(trace: ExitTrace) -> Frontier:
    """One policy, under which every token runs all layers."""
    last = np.zeros((len(trace.exit_layers), trace.num_tokens), dtype=np.bool_)
    last[-1] = True
    return traced(trace, [last], [math.inf], [(100.0,) * len(trace.exit_layers)])


def full_pass_seconds(model: EarlyExitModel, windows: Any) -> float:
    """Seconds of a pass in which every exit is scored and no token leaves early."""
    never = ThresholdPolicy(thresholds=(math.inf,) * (len(model.exit_layers) - 1))
    return _routed(model, windows, never, "max_prob", NOTHING_FITTED)[1]


def _policies(
    held_out: ExitTrace,
    measure: str,
    costs: Sequence[float],
    shares: NDArray[np.float64] | Sequence[float],
) -> Iterator[tuple[float, ThresholdPolicy | GainPolicy]]:
    """(threshold at the first exit, policy) for each share, the largest share first.

    ``costs`` are the flops_pct of leaving at each exit, which a policy of ``gain`` weighs. Shares
    whose thresholds are equal keep a policy each, so that the n-th policies of two models are of
    the same share.
    """
    first = held_out.confidence[measure][0].astype(np.float64)
    for threshold in np.sort(np.quantile(first, 1.0 - np.asarray(shares))).tolist():
        yield threshold, policy_at(threshold, measure, costs)


def policy_at(
    threshold: float, measure: str, costs: Sequence[float]
) -> ThresholdPolicy | GainPolicy:
    """The policy of a frontier with this threshold at the first exit."""
    if measure != "gain":
        return ThresholdPolicy(thresholds=(threshold,) * (len(costs) - 1))
    price = max(0.0, -threshold) / (costs[-1] - costs[0])
    return GainPolicy(price=price, costs=tuple(costs))


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """The frontiers of a model by one measure."""

    model: EarlyExitModel
    measure: str
    cost: ModelCost
    fitted: FittedExits
    traces: Mapping[TextName, ExitTrace]
    seq_len: int

    def traced(self, text: TextName) -> Frontier:
        """The frontier on exact keys and values, by array work on the trace."""
        costs = self.cost.flops_pct_by_exit(self.measure)  # complete exits: those of propagate
        policies = list(_policies(self.traces["held_out"], self.measure, costs, SHARES))
        trace = self.traces[text]
        inner = traced(
            trace,
            [_leaving(trace, self.measure, policy) for _, policy in policies],
            [threshold for threshold, _ in policies],
            [costs] * len(policies),
        )
        return self._between_ends(text, inner)

    def routed(
        self, text: TextName, ids: Int[Tensor, " N"], *, decoding: bool
    ) -> tuple[Frontier, list[float]]:
        """The frontier under ``propagate``, and the seconds of each policy's pass."""
        costs = self.cost.flops_pct_by_exit(self.measure, missing_kv="propagate")
        weighed = costs if decoding else self.cost.flops_pct_by_exit(self.measure)
        shares = DECODED_AT if decoding else PROPAGATED_AT
        policies = list(_policies(self.traces["held_out"], self.measure, weighed, shares))
        passes = [
            _routed(self.model, _windows(ids, self.seq_len), policy, self.measure, self.fitted)
            for _, policy in policies
        ]
        inner = routed(
            [trace for trace, _ in passes],
            [threshold for threshold, _ in policies],
            [costs] * len(passes),
            self.model.num_layers,
        )
        return self._between_ends(text, inner), [took for _, took in passes]

    def _between_ends(self, text: TextName, inner: Frontier) -> Frontier:
        """The frontier with its two ends, at which every token leaves at one exit.

        No token then reads keys or values above its exit, so the ends are exact.
        """
        first, last = (
            _end(self.traces[text], self.measure, self.cost, exit_index) for exit_index in (0, -1)
        )
        return join([first, inner, last])


def _leaving(
    trace: ExitTrace, measure: str, policy: ThresholdPolicy | GainPolicy
) -> NDArray[np.bool_]:
    """Where each token leaves (E, N)."""
    if isinstance(policy, GainPolicy):
        assert trace.expected_kl is not None
        return policy.leaving([losses[index:] for index, losses in enumerate(trace.expected_kl)])
    return policy.leaving(trace.scores(measure)[:-1], trace.position)


def _routed(
    model: EarlyExitModel,
    windows: Any,
    policy: ThresholdPolicy | GainPolicy,
    measure: str,
    fitted: FittedExits,
) -> tuple[RoutedTrace, float]:
    """The trace of a pass under ``propagate``, and its seconds."""
    start = time.perf_counter()
    trace = collect_routed(model, windows, policy, confidence=measure, fitted=fitted)
    return trace, time.perf_counter() - start


def _end(trace: ExitTrace, measure: str, cost: ModelCost, exit_index: int) -> Frontier:
    """Every token leaves at the first exit (0) or at the last (-1), with no score computed."""
    here = np.zeros((len(trace.exit_layers), trace.num_tokens), dtype=np.bool_)
    here[exit_index] = True
    scored = [False] * (len(trace.exit_layers) - 1)
    costs = cost.flops_pct_by_exit(measure, evaluated=scored)
    return traced(trace, [here], [-math.inf if exit_index == 0 else math.inf], [costs])
