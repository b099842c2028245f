"""What a trained model of a study is worth: its frontiers on held-out and on test text.

Thresholds are quantiles of the confidence on the held-out training text, so nothing is chosen on
the test text. Gates are fitted on the training text.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from offramp.studies.study.frontier import Frontier, join, routed, traced
from offramp.studies.study.plan import GateFit

SHARES = np.linspace(0.0, 1.0, 41)[1:-1]
"""Shares of held-out tokens that a policy of the frontier lets leave at the first exit."""
PROPAGATED_AT = (0.15, 0.35, 0.55, 0.75, 0.9)
"""The same under ``propagate``, where each policy takes a pass of its own."""
BATCH = 32

Texts = Mapping[str, Int[Tensor, " N"]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of one model."""

    exit_ppl: dict[int, float]
    "On the test text."
    flops: dict[str, float]
    "A token's, in the full model with one head; of the first gate, if there is one."
    frontiers: dict[str, Frontier]
    "By text/confidence/missing_kv; a model without early exits has one point, full/recompute."
    seconds: dict[str, list[float]]
    """Of a pass over the test text: at full depth, and by confidence one for each policy of the
    frontier under ``propagate``, its ends, which take no pass of their own, left out."""

    def save(self, path: Path) -> None:
        """Write the frontiers."""
        arrays: dict[str, Any] = {}
        for name, frontier in self.frontiers.items():
            frontier.save(arrays, name)
        np.savez_compressed(path, **arrays)


def evaluate(
    model: EarlyExitModel,
    train_ids: Int[Tensor, " N"],
    texts: Texts,
    *,
    measures: Sequence[str],
    gates: GateFit,
    seq_len: int,
    seed: int,
) -> Evaluation:
    """Trace and route a model on ``texts``: held_out and test."""

    def windows(ids: Int[Tensor, " N"], order: torch.Generator | None = None) -> Any:
        return batches(ids, seq_len=seq_len, batch_size=BATCH, order=order)

    early = len(model.exit_layers) > 1
    measures = measures if early else ()
    fitted = NOTHING_FITTED
    if kinds := [name for name in measures if confidence_named(name).needs_gate]:
        order = torch.Generator().manual_seed(seed)
        fitted = fit_exits(
            model,
            windows(train_ids, order),
            kinds=kinds,
            max_tokens=gates.tokens,
            config=GateConfig(seed=seed, steps=gates.steps),
        )
    cost = model_cost(model, context=(seq_len + 1) / 2, fitted=fitted)
    traces = {
        name: collect_trace(model, windows(ids), measures=measures, fitted=fitted)
        for name, ids in texts.items()
    }
    frontiers: dict[str, Frontier] = {}
    seconds = {"full": [full_pass_seconds(model, windows(texts["test"]))]}
    for name, trace in traces.items():
        full = [np.zeros((len(trace.exit_layers), trace.num_tokens), dtype=np.bool_)]
        full[0][-1] = True
        ends = (100.0,) * len(trace.exit_layers)
        frontiers[f"{name}/full/recompute"] = traced(trace, full, [math.inf], [ends])
    for measure in measures:
        for name, trace in traces.items():
            policies = list(_policies(traces["held_out"], measure, cost, SHARES))
            frontiers[f"{name}/{measure}/recompute"] = _recompute(trace, measure, policies, cost)
        policies = list(_policies(traces["held_out"], measure, cost, PROPAGATED_AT))
        passes = [
            _routed(model, windows(texts["test"]), policy, measure, fitted)
            for _, policy in policies
        ]
        seconds[measure] = [took for _, took in passes]
        frontiers[f"test/{measure}/propagate"] = _propagate(
            model,
            [trace for trace, _ in passes],
            [threshold for threshold, _ in policies],
            measure,
            cost,
            traces["test"],
        )
    return Evaluation(
        exit_ppl={layer: traces["test"].ppl(layer) for layer in model.exit_layers},
        flops={
            "full": cost.full,
            **{f"{kind} gate": min(by.values()) for kind, by in cost.gates.items()},
        },
        frontiers={  # only the test text is resampled
            name: frontier if name.startswith("test/") else frontier.whole()
            for name, frontier in frontiers.items()
        },
        seconds=seconds,
    )


def full_pass_seconds(model: EarlyExitModel, windows: Any) -> float:
    """Of a pass in which nobody leaves, though every exit is asked."""
    nobody = ThresholdPolicy(thresholds=(math.inf,) * (len(model.exit_layers) - 1))
    return _routed(model, windows, nobody, "max_prob", NOTHING_FITTED)[1]


def _policies(
    held_out: ExitTrace,
    measure: str,
    cost: ModelCost,
    shares: NDArray[np.float64] | Sequence[float],
) -> Iterator[tuple[float, ThresholdPolicy | GainPolicy]]:
    """(threshold at the first exit, policy) for each share, the largest first.

    Shares whose thresholds are equal keep a policy each: the n-th of two models is comparable.
    """
    first = held_out.confidence[measure][0].astype(np.float64)
    early = len(held_out.exit_layers) - 1
    for threshold in np.sort(np.quantile(first, 1.0 - np.asarray(shares))):
        if measure != "gain":
            yield float(threshold), ThresholdPolicy(thresholds=(float(threshold),) * early)
            continue
        costs = cost.flops_pct_by_exit("gain")
        price = max(0.0, -float(threshold)) / (costs[-1] - costs[0])
        yield float(threshold), GainPolicy(price=price, costs=costs)


def _recompute(
    trace: ExitTrace,
    measure: str,
    policies: Sequence[tuple[float, ThresholdPolicy | GainPolicy]],
    cost: ModelCost,
) -> Frontier:
    leaving = []
    for _, policy in policies:
        if isinstance(policy, GainPolicy):
            assert trace.expected_kl is not None
            expected = [losses[index:] for index, losses in enumerate(trace.expected_kl)]
            leaving.append(policy.leaving(expected))
        else:
            leaving.append(policy.leaving(trace.scores(measure)[:-1], trace.position))
    costs = [cost.flops_pct_by_exit(measure)] * len(policies)
    inner = traced(trace, leaving, [threshold for threshold, _ in policies], costs)
    return join([_end(trace, measure, cost, 0), inner, _end(trace, measure, cost, -1)])


def _routed(
    model: EarlyExitModel,
    windows: Any,
    policy: ThresholdPolicy | GainPolicy,
    measure: str,
    fitted: FittedExits,
) -> tuple[RoutedTrace, float]:
    """A pass under ``propagate``, and its seconds."""
    start = time.perf_counter()
    trace = collect_routed(model, windows, policy, confidence=measure, fitted=fitted)
    return trace, time.perf_counter() - start


def _propagate(
    model: EarlyExitModel,
    passes: Sequence[RoutedTrace],
    thresholds: Sequence[float],
    measure: str,
    cost: ModelCost,
    test: ExitTrace,
) -> Frontier:
    """Where every token or none leaves the states are exact, so the ends need no pass."""
    costs = [cost.flops_pct_by_exit(measure, missing_kv="propagate")] * len(passes)
    inner = routed(passes, thresholds, costs, model.num_layers)
    first = _end(test, measure, cost, 0)  # nobody reads the keys and values above the exit
    return join([first, inner, _end(test, measure, cost, -1)])


def _end(trace: ExitTrace, measure: str, cost: ModelCost, exit_index: int) -> Frontier:
    """Every token leaves at the first exit (0), or at the last (-1), and nobody is asked."""
    here = np.zeros((len(trace.exit_layers), trace.num_tokens), dtype=np.bool_)
    here[exit_index] = True
    asked = [False] * (len(trace.exit_layers) - 1)
    costs = cost.flops_pct_by_exit(measure, evaluated=asked)
    return traced(trace, [here], [-math.inf if exit_index == 0 else math.inf], [costs])
