"""Certified thresholds of a model on a text: ``offramp calibrate``."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from offramp.calibration.budget import keep_budget
from offramp.calibration.certificate import Certificate, model_sha256
from offramp.calibration.certify import DEFAULT_DELTA, Promise, certify, check_drift
from offramp.calibration.risk import check_path
from offramp.commands.reading import OnTokens, Reading, open_reading
from offramp.errors import ConfigError
from offramp.evaluation.cost import ModelCost
from offramp.evaluation.sweep import sweep


def certify_folder(
    folder: Path,
    corpus_name: str,
    promise: Promise,
    *,
    confidence: str = "max_prob",
    path: Sequence[Sequence[float]] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    on_tokens: OnTokens | None = None,
) -> tuple[Certificate, Reading]:
    """A certificate for a model on a text, from one pass; and what was read, for warnings.

    With fewer sequences than ``promise.sequences_needed`` it is one for the full model.
    """
    reading = _open(folder, corpus_name, device, dtype)
    if path is not None:
        path = check_path(path, len(reading.model.exit_layers))
    certificate = certify(
        reading.trace((confidence,), on_tokens=on_tokens),
        promise,
        model_sha256=model_sha256(folder),
        corpus_sha256=reading.corpus.sha256,
        confidence=confidence,
        path=path,
        cost=reading.cost(),
    )
    return certificate, reading


def keep_budget_folder(
    folder: Path,
    corpus_name: str,
    compute_budget: float,
    *,
    confidence: str = "max_prob",
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    on_tokens: OnTokens | None = None,
) -> dict[str, Any]:
    """The thresholds of least loss whose flops_pct is at most the budget, as a sweep's content."""
    reading = _open(folder, corpus_name, device, dtype)
    trace = reading.trace((confidence,), on_tokens=on_tokens)
    row = keep_budget(trace, compute_budget, cost=_needed(reading), confidence=confidence)
    return {
        **reading.about(),
        "confidence": confidence,
        "compute_budget": compute_budget,
        "rows": [asdict(row)],
        "exit_ppl": {layer: trace.ppl(layer) for layer in trace.exit_layers},
    }


def check_folder(
    folder: Path,
    corpus_name: str,
    certificate_file: Path,
    *,
    level: float = DEFAULT_DELTA,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    on_tokens: OnTokens | None = None,
) -> dict[str, Any]:
    """Whether a certificate's promise still holds on new text; refused for another model."""
    certificate = Certificate.load(certificate_file)
    certificate.require_model(model_sha256(folder))
    reading = _open(folder, corpus_name, device, dtype)
    trace = reading.trace((certificate.confidence,), on_tokens=on_tokens)
    check = check_drift(certificate, trace, level=level, cost=reading.cost())
    return {
        **reading.about(),
        "certificate": certificate.sha256,
        "same_corpus": reading.corpus.sha256 == certificate.corpus_sha256,
        **asdict(check),
    }


def sweep_certificate(
    folder: Path,
    corpus_name: str,
    certificate_file: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    on_tokens: OnTokens | None = None,
) -> dict[str, Any]:
    """A sweep's content for the certified thresholds; refused for another model."""
    certificate = Certificate.load(certificate_file)
    certificate.require_model(model_sha256(folder))
    reading = _open(folder, corpus_name, device, dtype)
    trace = reading.trace((certificate.confidence,), on_tokens=on_tokens)
    rows = sweep(
        trace, [certificate.thresholds], confidence=certificate.confidence, cost=reading.cost()
    )
    return {
        **reading.about(),
        "confidence": certificate.confidence,
        "certificate": certificate.sha256,
        "rows": [asdict(row) for row in rows],
        "exit_ppl": {layer: trace.ppl(layer) for layer in trace.exit_layers},
    }


def _open(folder: Path, corpus_name: str, device: str, dtype: torch.dtype | None) -> Reading:
    reading = open_reading(folder, corpus_name, device=device, dtype=dtype)
    if len(reading.model.exit_layers) < 2:
        raise ConfigError("exit layers: expected at least one before the last, got none")
    return reading


def _needed(reading: Reading) -> ModelCost:
    cost = reading.cost()
    if cost is None:
        raise ConfigError(
            "compute_budget: expected a model whose blocks can be run one by one, to count "
            "their FLOPs"
        )
    return cost
