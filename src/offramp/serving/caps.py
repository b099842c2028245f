"""A certificate caps what requests may ask for: none goes below its thresholds."""

from dataclasses import replace

from offramp.calibration.thresholds import StoredThresholds
from offramp.commands.generate import with_thresholds
from offramp.errors import CertificateError
from offramp.exits.default_confidence import default_confidence, in_nats
from offramp.exits.policy import ThresholdPolicy
from offramp.generation.config import GenerateConfig
from offramp.models.open import OpenedModel
from offramp.serving.values import Cap


def cap_of(stored: StoredThresholds) -> Cap:
    """Return what the API says of a certificate."""
    return Cap(
        thresholds=stored.thresholds, confidence=stored.confidence, missing_kv=stored.missing_kv
    )


def capped(
    config: GenerateConfig, stored: StoredThresholds, opened: OpenedModel, *, missing_kv: str | None
) -> GenerateConfig:
    """Return the config of a request under a certificate.

    Without a threshold it is the certificate's. Speculative decoding stays at full depth, which no
    certificate restricts. ``missing_kv`` is what the request names. Raises CertificateError for
    another confidence or ``missing_kv``, and for a threshold that is or falls below the
    certificate's at any exit.
    """
    if config.decay is not None:
        raise CertificateError(
            f"decay: expected none with a certificate, whose thresholds hold, got {config.decay:g}"
        )
    if config.confidence not in (None, stored.confidence):
        raise CertificateError(
            f"confidence: expected {stored.confidence}, by which the certificate's thresholds "
            f"decide, got {config.confidence}"
        )
    plain = replace(config, speculative=False)
    allowed = with_thresholds(plain, stored, missing_kv=missing_kv, model=opened.model)
    if config.speculative:
        return config
    if config.threshold is None:
        return allowed
    layers = opened.model.exit_layers
    wanted = ThresholdPolicy.of(config.threshold, len(layers)).thresholds
    shares = config.confidence is None and default_confidence(opened.fitted, layers) == "gain"
    if shares and stored.confidence == "gain":
        wanted = tuple(map(in_nats, wanted))
    for layer, least, threshold in zip(layers, stored.thresholds, wanted, strict=False):
        if threshold < least:
            raise CertificateError(
                f"threshold: expected at least {least:g} at exit {layer}, which the certificate "
                f"allows, got {threshold:g}"
            )
    return replace(allowed, threshold=wanted)
