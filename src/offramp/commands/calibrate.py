"""Certified thresholds, compute budgets and drift checks: ``offramp calibrate``."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from offramp.calibration.budget import keep_budget
from offramp.calibration.certificate import Certificate, finite_or_word
from offramp.calibration.certify import certify as certify_trace
from offramp.calibration.check import check_drift
from offramp.calibration.promise import DEFAULT_DELTA, Promise
from offramp.calibration.risk import check_path
from offramp.commands.text import MeasuredText, OnTokens, read_text
from offramp.errors import ConfigError
from offramp.exits.default_confidence import default_confidence
from offramp.models.open import OpenedModel


def certify(
    opened: OpenedModel,
    corpus: str,
    promise: Promise,
    *,
    confidence: str | None = None,
    path: Sequence[Sequence[float]] | None = None,
    on_tokens: OnTokens | None = None,
) -> tuple[Certificate, MeasuredText]:
    """Certify thresholds for a model on a text, from one pass; also returns the text.

    Without ``confidence`` thresholds are on gain if it was fitted, else on max_prob. With fewer
    sequences than ``promise.sequences_needed`` the certificate is for the full model.
    """
    opened.require_exits()
    confidence = confidence or default_confidence(opened.fitted, opened.model.exit_layers)
    text = read_text(opened, corpus)
    if path is not None:
        path = check_path(path, len(opened.model.exit_layers))
    certificate = certify_trace(
        text.trace((confidence,), on_tokens=on_tokens),
        promise,
        model_sha256=opened.sha256,
        dtype=opened.precision,
        bos=bool(opened.first_tokens),
        weights=opened.weights,
        corpus_sha256=text.corpus.sha256,
        confidence=confidence,
        path=path,
        cost=text.cost(),
        complete_from=opened.model.complete_from,
    )
    return certificate, text


def keep_compute_budget(
    opened: OpenedModel,
    corpus: str,
    compute_budget: float,
    *,
    confidence: str | None = None,
    on_tokens: OnTokens | None = None,
) -> dict[str, Any]:
    """Find the thresholds of least loss whose FLOPs% is at most the budget.

    Returns the content of a sweep with one row, and the thresholds in the form that
    ``load_thresholds`` reads.
    """
    opened.require_exits()
    confidence = confidence or default_confidence(opened.fitted, opened.model.exit_layers)
    text = read_text(opened, corpus)
    trace = text.trace((confidence,), on_tokens=on_tokens)
    cost = text.cost()
    if cost is None:
        raise ConfigError(
            "compute_budget: expected a model whose blocks can be run one by one, to count "
            "their FLOPs"
        )
    row = keep_budget(trace, compute_budget, cost=cost, confidence=confidence)
    thresholds = row.threshold if isinstance(row.threshold, tuple) else (row.threshold,)
    return {
        **text.about(),
        "confidence": confidence,
        "compute_budget": compute_budget,
        "model_sha256": opened.sha256,
        "dtype": opened.precision,
        "thresholds": finite_or_word(thresholds),
        "rows": [asdict(row)],
        "exit_ppl": {layer: trace.ppl(layer) for layer in trace.exit_layers},
    }


def check(
    opened: OpenedModel,
    corpus: str,
    certificate: Certificate,
    *,
    level: float = DEFAULT_DELTA,
    on_tokens: OnTokens | None = None,
) -> dict[str, Any]:
    """Test on new text whether a certificate's guarantee still holds.

    Raises CertificateError for another model's certificate.
    """
    certificate.require_model(opened.sha256, weights=opened.weights)
    certificate.require_bos(bool(opened.first_tokens))
    opened.require_exits()
    text = read_text(opened, corpus)
    trace = text.trace((certificate.confidence,), on_tokens=on_tokens)
    found = check_drift(certificate, trace, level=level, cost=text.cost())
    return {
        **text.about(),
        "certificate": certificate.sha256,
        "same_corpus": text.corpus.sha256 == certificate.corpus_sha256,
        **asdict(found),
    }
