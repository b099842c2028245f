"""Read thresholds from a certificate, or from a file of ``calibrate --compute-budget``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.calibration.certificate import (
    DTYPES,
    Certificate,
    check_bos_used,
    check_model,
    finite_or_word,
    warn_of_dtype,
)
from offramp.errors import CertificateError, ConfigError
from offramp.models.native.schemes import Scheme
from offramp.reading import read_json
from offramp.schema import fitting, shown


@dataclass(frozen=True, kw_only=True)
class StoredThresholds:
    """The thresholds in a file of ``offramp calibrate``, for ``generate`` and ``sweep``."""

    thresholds: tuple[float, ...]
    "One threshold for each exit but the last; no token exits where the threshold is inf."
    confidence: str
    missing_kv: str
    model_sha256: str
    dtype: str
    "Precision in which the model was measured."
    bos: bool = False
    "Whether the model's first tokens, such as BOS, began every window."
    weights: Scheme | None = None
    "Scheme of the model's quantised weights, int8 or int4; None if they are numbers."
    sha256: str | None = None
    "Hash of the certificate; None for a compute budget, which guarantees nothing."

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype: expected one of {', '.join(DTYPES)}, got {shown(self.dtype)}"
            )
        if not self.thresholds or any(math.isnan(value) for value in self.thresholds):
            raise ConfigError(f"thresholds: expected numbers, got {self.thresholds}")

    @classmethod
    def of(cls, certificate: Certificate) -> "StoredThresholds":
        """Return the thresholds of a certificate."""
        return cls(
            thresholds=certificate.thresholds,
            confidence=certificate.confidence,
            missing_kv=certificate.missing_kv,
            model_sha256=certificate.model_sha256,
            dtype=certificate.dtype,
            bos=certificate.bos,
            weights=certificate.weights,
            sha256=certificate.sha256,
        )

    def require_model(self, model_sha256: str, *, weights: Scheme | None = None) -> None:
        """Raise a CertificateError unless the thresholds are this model's."""
        check_model((self.model_sha256, self.weights), (model_sha256, weights))

    def require_bos(self, bos: bool) -> None:
        """Raise a CertificateError unless texts begin as those of the calibration."""
        check_bos_used(self.bos, bos)

    def warn_of_dtype(self, dtype: str) -> None:
        """Warn with an OfframpWarning if the model runs in another precision."""
        warn_of_dtype(self.dtype, dtype)


def load_thresholds(path: Path) -> StoredThresholds:
    """Read a certificate, or the thresholds that ``calibrate --compute-budget`` wrote.

    Raises CertificateError for any other file, and for a certificate that was edited.
    """
    stored = read_json(path)
    if isinstance(stored, dict) and "compute_budget" in stored:
        rest = {name: value for name, value in stored.items() if name != "sha256"}
        try:
            return fitting(StoredThresholds, rest, foreign=True)
        except ConfigError as error:
            raise CertificateError(f"{path}: {error}") from None
    return StoredThresholds.of(Certificate.load(path))


def thresholds_flag(thresholds: Sequence[float]) -> str:
    """Format thresholds for ``--thresholds`` and ``--threshold``, such as 0.9:0.8."""
    return ":".join(str(word) for word in finite_or_word(list(thresholds)))
