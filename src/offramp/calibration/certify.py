"""Certify thresholds: find the boldest ones that keep a promise."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from offramp.calibration.bounds import conformal_steps, fixed_sequence, p_values
from offramp.calibration.certificate import Certificate, finite_or_word
from offramp.calibration.promise import Promise
from offramp.calibration.risk import (
    ThresholdPath,
    check_path,
    sequence_losses,
    threshold_path,
    whole_sequences,
)
from offramp.evaluation.cost import ModelCost
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import ExitTrace
from offramp.exits.policy import ThresholdPolicy
from offramp.models.missing_kv import EXACT, are_complete
from offramp.models.native.schemes import Scheme


def certify(
    trace: ExitTrace,
    promise: Promise,
    *,
    model_sha256: str,
    dtype: str = "float32",
    bos: bool = False,
    weights: Scheme | None = None,
    corpus_sha256: str,
    confidence: str = "max_prob",
    path: Sequence[Sequence[float]] | None = None,
    cost: ModelCost | None = None,
    complete_from: int | None = None,
) -> Certificate:
    """Certify the boldest step of the path that keeps the promise.

    If no step keeps it, the thresholds are those of the full model. ``path`` must be fixed before
    the trace is seen (default: ``threshold_path``). Windows that are shorter than the others are
    ignored. ``complete_from`` is the model's (default: it has no complete exits), and ``weights``
    the scheme of its weights if they are quantised.
    """
    trace = whole_sequences(trace)
    num_exits = len(trace.exit_layers)
    if path is None:
        path = threshold_path(confidence, num_exits)
    steps = check_path(path, num_exits)
    losses = sequence_losses(
        trace, steps, confidence=confidence, risk=promise.risk, bound=promise.bound
    )
    n = len(losses)
    test = promise.test_for(n)  # it depends on n only, never on the losses
    certified, tested = _certified_steps(losses, promise, test)
    thresholds = steps[certified - 1] if certified else (math.inf,) * (num_exits - 1)
    [row] = sweep(trace, [thresholds], confidence=confidence, cost=cost)
    return Certificate(
        model_sha256=model_sha256,
        dtype=dtype,
        corpus_sha256=corpus_sha256,
        risk=promise.risk,
        epsilon=promise.epsilon,
        delta=promise.delta if promise.method == "ltt" else None,
        method=promise.method,
        confidence=confidence,
        missing_kv=_missing_kv(trace, thresholds, complete_from),
        n=n,
        thresholds=thresholds,
        p_values=tested,
        expected_compute_pct=row.compute_pct,
        expected_flops_pct=row.flops_pct,
        assumptions={
            **_assumptions(promise, steps, sequence_tokens=trace.num_tokens // n),
            **({"test": test} if promise.method == "ltt" else {}),
            "bos": bos,
            **({} if weights is None else {"weights": weights}),
        },
    ).signed()


def _certified_steps(
    losses: Float[NDArray[np.float64], "N S"], promise: Promise, test: str
) -> tuple[int, tuple[float, ...] | None]:
    """Return how many steps of the path keep the promise, and the p-values that were looked at."""
    if promise.method != "ltt":
        return int(conformal_steps(losses, promise.scaled_epsilon)), None
    found = p_values(losses, promise.scaled_epsilon, delta=promise.delta, test=test)
    certified = int(fixed_sequence(found, promise.delta))
    return certified, tuple(found[: certified + 1].tolist())


def _missing_kv(trace: ExitTrace, thresholds: tuple[float, ...], complete_from: int | None) -> str:
    """Return "exact" if tokens leave only at complete exits, else how a trace was measured."""
    last = trace.num_layers
    least = last if complete_from is None else complete_from
    used = ThresholdPolicy(thresholds=thresholds).used(trace.exit_layers)
    return EXACT if are_complete(used, complete_from=least, num_layers=last) else "recompute"


def _assumptions(promise: Promise, path: ThresholdPath, *, sequence_tokens: int) -> dict[str, Any]:
    if promise.risk == "disagreement":
        what = (
            f"at most {100 * promise.epsilon:g}% of the tokens get another prediction than from "
            "the full model"
        )
    else:
        what = (
            f"the NLL gap to the full model, clipped from 0 to {promise.bound} nats per token, is "
            f"at most {promise.epsilon} nats on average"
        )
    if promise.method == "ltt":
        sure = f"With probability {1 - promise.delta:g} or more over the calibration text, "
    else:
        sure = "On average over calibration texts, "
    return {
        "promise": f"{sure}{what}.",
        "text": (
            "It holds for sequences from the same distribution as the calibration sequences, if "
            "they are independent; contiguous windows of one document are only partly so."
        ),
        "not_covered": (
            "Free-running generation: the promise is about the tokens of a given text, "
            "not about text that the model generates."
        ),
        "unit": "sequence",
        "sequence_tokens": sequence_tokens,
        "bound": promise.scale,
        "path": [finite_or_word(step) for step in path],
    }
