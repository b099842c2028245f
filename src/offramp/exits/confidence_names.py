"""The names of the confidence measures, which ``confidence`` computes. Imports no PyTorch."""

from offramp.errors import ConfigError

CONFIDENCE_NAMES = ("max_prob", "margin", "entropy", "saturation", "patience", "gate", "gain")
"""The keys of ``offramp.exits.confidence.CONFIDENCE``."""


def check_confidence(name: str) -> None:
    """Raise ConfigError unless there is a confidence measure of this name."""
    if name not in CONFIDENCE_NAMES:
        raise ConfigError(
            f"confidence: expected one of {', '.join(CONFIDENCE_NAMES)}, got {name!r}"
        )
