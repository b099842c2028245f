"""A certificate: certified thresholds, the model that they belong to, and what they guarantee."""

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from offramp.calibration.promise import GENERATED_RISKS
from offramp.errors import CertificateError, ConfigError, OfframpWarning
from offramp.files import write_json
from offramp.models.native.schemes import SCHEMES, Scheme
from offramp.reading import parsing, read_json
from offramp.schema import fitting, shown

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Precisions of a model."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Certificate:
    """Certified thresholds of one model, as ``offramp calibrate`` writes them.

    ``certify`` makes a certificate. ``sha256`` is the hash of all other fields.
    """

    model_sha256: str
    dtype: str
    "Precision in which the model was measured, such as float32."
    corpus_sha256: str
    risk: str
    epsilon: float
    "Upper bound on the risk: a share of the tokens, or nats per token."
    delta: float | None
    "Probability that the bound fails, over draws of the text; None for conformal risk control."
    method: str
    "``ltt`` (Learn-then-Test) or ``crc`` (conformal risk control)."
    confidence: str
    missing_kv: str
    """recompute: what the trace was measured with; exact if no token leaves at an exit that is not
    complete, so that every way to decode gives the same numbers."""
    n: int
    "Number of sequences of the calibration text."
    thresholds: tuple[float, ...]
    "One threshold for each exit but the last; no token leaves at an exit whose threshold is inf."
    p_values: tuple[float, ...] | None
    "The p-value of each step of the path; None for conformal risk control."
    expected_compute_pct: float
    expected_flops_pct: float | None
    assumptions: dict[str, Any]
    "What the guarantee assumes, and what it does not cover."
    sha256: str = ""

    def __post_init__(self) -> None:
        numbers = {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "bound": self.assumptions.get("bound", 1.0),
        }
        for name, value in numbers.items():
            if not (value is None or (isinstance(value, int | float) and 0 < value < math.inf)):
                raise ConfigError(f"{name}: expected a number above 0, got {shown(value)}")
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype: expected one of {', '.join(DTYPES)}, got {shown(self.dtype)}"
            )
        if not self.thresholds or any(math.isnan(value) for value in self.thresholds):
            raise ConfigError(f"thresholds: expected numbers, got {self.thresholds}")
        if self.on_generation:
            self._check_generation()

    def _check_generation(self) -> None:
        if self.risk not in GENERATED_RISKS:
            expected = ", ".join(GENERATED_RISKS)
            raise ConfigError(
                f"risk: expected one of {expected} on generation, got {shown(self.risk)}"
            )
        tokens = self.assumptions.get("sequence_tokens")
        if type(tokens) is not int or tokens < 1:
            raise ConfigError(f"sequence_tokens: expected at least 1, got {shown(tokens)}")

    def __repr__(self) -> str:
        chosen = ", ".join(f"{value:g}" for value in self.thresholds)
        return (
            f"Certificate({self.risk} at most {self.epsilon:g}: {self.confidence} thresholds "
            f"{chosen}, Compute% {self.expected_compute_pct:.1f}, {self.n:,} sequences)"
        )

    def signed(self) -> "Certificate":
        """Return the certificate with its ``sha256`` filled in."""
        return replace(self, sha256=_digest(self))

    @property
    def is_full_model(self) -> bool:
        """Whether no threshold was certified, so that no token leaves early."""
        return all(threshold == float("inf") for threshold in self.thresholds)

    @property
    def bound(self) -> float:
        """Value at which the loss of each token is clipped: nats, or 1 for disagreement."""
        return float(self.assumptions["bound"])

    @property
    def on_generation(self) -> bool:
        """Whether it covers texts that the model writes itself, rather than a given text."""
        return self.assumptions.get("on") == "generation"

    @property
    def bos(self) -> bool:
        """Whether the model's first tokens, such as BOS, began every window."""
        return self.assumptions.get("bos") is True

    @property
    def weights(self) -> Scheme | None:
        """Scheme of the model's quantised weights, int8 or int4; None if they are numbers."""
        found = self.assumptions.get("weights")
        return next((scheme for scheme in SCHEMES if scheme == found), None)

    def require_model(self, model_sha256: str, *, weights: Scheme | None = None) -> None:
        """Raise a CertificateError unless the certificate is this model's.

        ``weights`` is the scheme of the model's weights, for the message.
        """
        check_model((self.model_sha256, self.weights), (model_sha256, weights))

    def require_bos(self, bos: bool) -> None:
        """Raise a CertificateError unless texts begin as those of the certificate."""
        check_bos_used(self.bos, bos)

    def warn_of_dtype(self, dtype: str) -> None:
        """Warn with an OfframpWarning if the model runs in another precision."""
        warn_of_dtype(self.dtype, dtype)

    def save(self, path: str | Path) -> None:
        """Write the certificate as JSON, completely or not at all."""
        write_json(Path(path), self.content())

    def content(self) -> dict[str, Any]:
        """Return the content of the JSON file, in which infinity is the string "inf"."""
        return {**asdict(self), "thresholds": finite_or_word(self.thresholds)}

    @classmethod
    def load(cls, path: Path) -> "Certificate":
        """Read a certificate. Raises CertificateError if it is not one, or was edited."""
        stored = read_json(path)
        if isinstance(stored, dict) and "compute_budget" in stored:
            raise CertificateError(
                f"{path}: expected a certificate, got thresholds for a compute budget, which have "
                "no guarantee to check"
            )
        names = [field.name for field in fields(cls)]
        if not isinstance(stored, dict) or not {*names} <= set(stored):
            raise CertificateError(f"{path}: expected a certificate with {', '.join(names)}")
        with parsing(path, "a certificate"):
            digest = hashlib.sha256(_canonical(stored)).hexdigest()
        if stored["sha256"] != digest:
            raise CertificateError(
                f"{path}: expected a certificate as it was written, but it was edited: its sha256 "
                f"is {digest}, but the file states {shown(stored['sha256'])}"
            )
        try:
            return fitting(cls, stored)
        except ConfigError as error:
            raise CertificateError(f"{path}: {error}") from None


def check_model(of_file: tuple[str, Scheme | None], of_model: tuple[str, Scheme | None]) -> None:
    """Raise a CertificateError unless a file's thresholds were found for this model.

    Each is the hash of a model, and the scheme of its weights if they are quantised. The formats
    of the same weights are different models.
    """
    if of_file[0] != of_model[0]:
        found, here = (
            "" if weights is None else f" with {weights} weights"
            for _, weights in (of_file, of_model)
        )
        raise CertificateError(
            f"certificate: expected one for this model{here}, sha256 {of_model[0]}, got one for "
            f"{of_file[0]}{found}"
        )


def check_bos_used(of_file: bool, of_model: bool) -> None:
    """Raise a CertificateError unless both were measured with BOS, or both without."""
    if of_file != of_model:
        made, used = ("yes" if bos else "no" for bos in (of_file, of_model))
        raise CertificateError(
            f"bos: expected {made}, with which the certificate's thresholds were found, got {used}"
        )


def warn_of_dtype(of_file: str, of_model: str) -> None:
    """Warn if a model does not run in the precision in which a file's thresholds were found."""
    if of_file != of_model:
        warnings.warn(
            f"certificate: its thresholds were found in {of_file}, but the model runs in "
            f"{of_model}, so what it states does not cover this model",
            OfframpWarning,
            stacklevel=3,
        )


def finite_or_word(numbers: Sequence[float]) -> list[float | str]:
    """Replace infinity by a string, because JSON has no infinity."""
    return [str(number) if math.isinf(number) else number for number in numbers]


def _digest(certificate: Certificate) -> str:
    return hashlib.sha256(_canonical(certificate.content())).hexdigest()


def _canonical(stored: dict[str, Any]) -> bytes:
    """Return all fields but ``sha256`` as UTF-8 JSON with sorted keys and no spaces."""
    rest = {name: value for name, value in stored.items() if name != "sha256"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
