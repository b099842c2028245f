"""PPL and cost of any number of thresholds from one pass over a text: ``offramp sweep``."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from offramp.calibration.thresholds import StoredThresholds
from offramp.commands.text import OnTokens, read_text
from offramp.evaluation.sweep import Threshold
from offramp.evaluation.sweep import sweep as sweep_trace
from offramp.exits.confidence import confidence_named
from offramp.exits.default_confidence import confidence_and_threshold, default_confidence
from offramp.exits.policy import ThresholdPolicy
from offramp.models.open import OpenedModel

DEFAULT_THRESHOLDS: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_OTHER_DEFAULTS: dict[str, tuple[float, ...]] = {
    "patience": (1.0, 2.0, 3.0),
    "gain": (-1.0, -0.5, -0.2, -0.1, -0.05, -0.02),  # nats
}


def default_thresholds(confidence: str) -> tuple[float, ...]:
    """Return the default thresholds of ``sweep``, in the unit of this measure."""
    return _OTHER_DEFAULTS.get(confidence, DEFAULT_THRESHOLDS)


def sweep(
    opened: OpenedModel,
    corpus: str,
    thresholds: Sequence[Threshold] | None = None,
    *,
    confidence: str | None = None,
    stored: StoredThresholds | None = None,
    on_tokens: OnTokens | None = None,
) -> dict[str, Any]:
    """What ``offramp sweep`` writes: a row for each threshold, from one pass over a text.

    Without ``confidence`` gain decides if it was fitted, else max_prob; a threshold means what it
    means for ``generate`` (exits/default_confidence.py). ``stored`` takes the place of
    ``thresholds`` and ``confidence``: those of a file that ``offramp calibrate`` wrote. The model's
    fitted temperatures and gates are used, and FLOPs% counts exit heads and gates. Raises
    ConfigError for thresholds that do not fit the model's exits or a measure whose gates were not
    fitted, CertificateError for thresholds that were found for another model.
    """
    if stored is not None:
        stored.require_model(opened.sha256, weights=opened.weights)
        stored.require_bos(bool(opened.first_tokens))
        thresholds, confidence = [stored.thresholds], stored.confidence
    fitted, exits = opened.fitted, opened.model.exit_layers
    if thresholds is None:
        confidence = confidence or default_confidence(fitted, exits)
        thresholds = default_thresholds(confidence)
    named = confidence or default_confidence(fitted, exits)
    confidence_named(named)
    chosen = [
        confidence_and_threshold(confidence, each, fitted=fitted, exit_layers=exits)[1]
        for each in thresholds
    ]
    for threshold in chosen:
        ThresholdPolicy.of(threshold, len(opened.model.exit_layers))
    text = read_text(opened, corpus)
    trace = text.trace((named,), on_tokens=on_tokens)
    rows = sweep_trace(trace, chosen, confidence=named, cost=text.cost())
    return {
        **text.about(),
        "confidence": named,
        **({} if stored is None else {"certificate": stored.sha256}),
        "rows": [asdict(row) for row in rows],
        "exit_ppl": {layer: trace.ppl(layer) for layer in trace.exit_layers},
    }
