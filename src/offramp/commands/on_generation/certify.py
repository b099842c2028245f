"""Certify thresholds on texts that the model writes itself: ``calibrate --on generation``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from offramp.calibration.bounds import conformal_steps, p_values
from offramp.calibration.certificate import Certificate, finite_or_word
from offramp.calibration.check import drift
from offramp.calibration.promise import Promise
from offramp.calibration.risk import check_path, threshold_path
from offramp.commands.on_generation.config import Prompts, WriteConfig
from offramp.commands.on_generation.writer import (
    OnPrompt,
    Thresholds,
    Writer,
    Written,
    prompts_of_file,
    prompts_of_text,
)
from offramp.data.prompts import JSON_LINES
from offramp.errors import ConfigError
from offramp.exits.default_confidence import default_confidence
from offramp.exits.policy import ThresholdPolicy
from offramp.models.missing_kv import EXACT, missing_kv_of
from offramp.models.open import OpenedModel
from offramp.options import config_of


@dataclass(frozen=True, kw_only=True)
class TestedStep:
    """What the texts of one step of the path showed."""

    thresholds: Thresholds
    loss: float
    "Mean loss over the prompts, in the unit of the promise."
    p_value: float | None
    mean_layers: float
    tokens_per_s: float


def certify_generation(
    opened: OpenedModel,
    prompts: Prompts,
    promise: Promise,
    config: WriteConfig,
    *,
    confidence: str,
    path: Sequence[Sequence[float]] | None = None,
    on_prompt: OnPrompt | None = None,
) -> tuple[Certificate, list[TestedStep], Written]:
    """Certify the boldest thresholds of a path that keep a promise on texts that they write.

    All prompts are continued at full depth, then with the thresholds of each step, from careful to
    bold, until the first step that does not keep the promise. Returns the certificate, what each
    step showed, and the texts of full depth. ``path`` must be fixed before the prompts are seen.

    Raises ConfigError for too few prompts, with the number that is needed.
    """
    opened.require_exits()
    exits = len(opened.model.exit_layers)
    steps = check_path(path or threshold_path(confidence, exits, steps=config.steps), exits)
    n = len(prompts.ids)
    _require_enough(n, promise)
    writer = Writer(
        opened, prompts, config, confidence=confidence, on_prompt=on_prompt, most=len(steps)
    )
    full = writer.full  # its time is that of full depth alone
    tested, columns, kept = list[TestedStep](), [], 0
    cost = (100.0, 100.0)
    for thresholds in steps:
        early = writer.write(thresholds)
        columns.append(writer.losses(early, promise.risk, bound=promise.bound))
        p_value, holds = _holds(np.stack(columns, axis=1), promise)
        tested.append(_step(writer, early, thresholds, columns[-1], promise, p_value))
        if not holds:
            break
        kept, cost = kept + 1, writer.cost(early, thresholds)
    thresholds = steps[kept - 1] if kept else (math.inf,) * (exits - 1)
    used = ThresholdPolicy(thresholds=thresholds).used(opened.model.exit_layers)
    certificate = Certificate(
        model_sha256=opened.sha256,
        dtype=opened.precision,
        corpus_sha256=prompts.sha256,
        risk=promise.risk,
        epsilon=promise.epsilon,
        delta=promise.delta if promise.method == "ltt" else None,
        method=promise.method,
        confidence=confidence,
        missing_kv=missing_kv_of(opened.model, config.missing_kv, used),
        n=n,
        thresholds=thresholds,
        p_values=_p_values(tested) if promise.method == "ltt" else None,
        expected_compute_pct=cost[0],
        expected_flops_pct=cost[1],
        assumptions={
            **_assumptions(promise, prompts, config),
            **_measured_with(opened, promise, steps, n),
        },
    ).signed()
    return certificate, tested, full


def _p_values(tested: Sequence[TestedStep]) -> tuple[float, ...]:
    return tuple(step.p_value for step in tested if step.p_value is not None)


def _require_enough(n: int, promise: Promise) -> None:
    if n < promise.sequences_needed:
        raise ConfigError(
            f"prompts: expected at least {promise.sequences_needed} for epsilon "
            f"{promise.epsilon:g} and delta {promise.delta:g}, got {n}"
        )


def _measured_with(
    opened: OpenedModel, promise: Promise, steps: Sequence[Thresholds], n: int
) -> dict[str, Any]:
    """Return the path, the test and the form of the model, as a certificate states them."""
    return {
        "path": [finite_or_word(step) for step in steps],
        **({"test": promise.test_for(n)} if promise.method == "ltt" else {}),
        "bos": bool(opened.first_tokens),
        **({} if opened.weights is None else {"weights": opened.weights}),
    }


def _holds(losses: Any, promise: Promise) -> tuple[float | None, bool]:
    """Return the p-value of the last step, None without tests, and whether the promise holds."""
    if promise.method == "crc":
        allowed = int(conformal_steps(losses, promise.scaled_epsilon))
        return None, allowed == losses.shape[1]
    test = promise.test_for(len(losses))
    found = p_values(losses[:, -1:], promise.scaled_epsilon, delta=promise.delta, test=test)
    return float(found[0]), bool(found[0] <= promise.delta)


def _step(
    writer: Writer,
    early: Written,
    thresholds: Thresholds,
    losses: Any,
    promise: Promise,
    p_value: float | None,
) -> TestedStep:
    layers = tuple(writer.opened.model.exit_layers)
    run = np.dot(early.exits(layers), layers)
    return TestedStep(
        thresholds=thresholds,
        loss=float(losses.mean()) * promise.scale,
        p_value=p_value,
        mean_layers=float(run) / early.tokens,
        tokens_per_s=early.tokens_per_s,
    )


_WHAT = {
    "divergence": "the share of a text from the first token on that differs from full depth's",
    "rouge-l": "1 - ROUGE-L of a text against that of full depth",
    "nll-gap": (
        "the full model's mean NLL of a text, minus that of its own text, clipped from 0 to "
        "{bound:g} nats,"
    ),
}


def _assumptions(promise: Promise, prompts: Prompts, config: WriteConfig) -> dict[str, Any]:
    """Say what a certificate covers, in plain sentences."""
    what = _WHAT[promise.risk].format(bound=promise.bound)
    sure = (
        f"With probability {1 - promise.delta:g} or more over the calibration prompts, "
        if promise.method == "ltt"
        else "On average over calibration prompts, "
    )
    return {
        "on": "generation",
        "promise": f"{sure}{what} is at most {promise.epsilon:g} on average over prompts.",
        "text": (
            "It holds for greedy texts that the model writes with these thresholds, weights and "
            f"missing_kv, of at most {config.max_new_tokens} new tokens, after prompts from the "
            "same distribution as the calibration prompts, if they are independent."
        ),
        "not_covered": (
            "Sampled text, longer texts, and a single text: the promise is about the average over "
            "prompts."
        ),
        "unit": "prompt",
        "sequence_tokens": config.max_new_tokens,
        "prompts": prompts.about,
        "bound": promise.scale,
    }


def check_generation(
    opened: OpenedModel,
    prompts: Prompts,
    certificate: Certificate,
    config: WriteConfig,
    *,
    level: float,
    on_prompt: OnPrompt | None = None,
) -> dict[str, Any]:
    """Test on new prompts whether a certificate on generation still holds.

    The texts are as long as those of the certificate. Raises CertificateError for another model's
    certificate.
    """
    certificate.require_model(opened.sha256, weights=opened.weights)
    certificate.require_bos(bool(opened.first_tokens))
    opened.require_exits()
    stated: Any = certificate.missing_kv
    config = replace(
        config,
        missing_kv=config.missing_kv if stated == EXACT else stated,
        max_new_tokens=certificate.assumptions["sequence_tokens"],
    )
    writer = Writer(opened, prompts, config, confidence=certificate.confidence, on_prompt=on_prompt)
    early = writer.write(certificate.thresholds)
    losses = writer.losses(early, certificate.risk, bound=certificate.bound)
    compute, flops = writer.cost(early, certificate.thresholds)
    found = drift(certificate, losses, level=level, compute_pct=compute, flops_pct=flops)
    return {
        "certificate": certificate.sha256,
        "on": "generation",
        "prompts": prompts.about,
        "same_corpus": prompts.sha256 == certificate.corpus_sha256,
        "untrained": not opened.exits_trained,
        "full_tokens_per_s": writer.full.tokens_per_s,
        "tokens_per_s": early.tokens_per_s,
        **asdict(found),
    }


def certify_texts(
    opened: OpenedModel,
    text: str | Path,
    options: Mapping[str, Any],
    *,
    confidence: str | None = None,
    on_prompt: OnPrompt | None = None,
) -> Certificate:
    """Certify thresholds from the options of Python: fields of ``Promise`` and ``WriteConfig``.

    ``text`` is a ``.jsonl`` file of prompts, or a corpus from which prompts are cut.
    """
    names = {field.name for field in fields(WriteConfig)}
    config = config_of(WriteConfig, {n: v for n, v in options.items() if n in names})
    promise = config_of(Promise, {n: v for n, v in options.items() if n not in names})
    opened.require_exits()
    measure = confidence or default_confidence(opened.fitted, opened.model.exit_layers)
    if str(text).lower().endswith(JSON_LINES):
        prompts = prompts_of_file(opened, Path(text), config)
    else:
        prompts = prompts_of_text(opened, str(text), config)
    return certify_generation(
        opened, prompts, promise, config, confidence=measure, on_prompt=on_prompt
    )[0]
