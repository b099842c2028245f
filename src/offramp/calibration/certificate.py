"""A certificate: which thresholds keep which promise about which model, and on what ground."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from offramp.errors import CertificateError
from offramp.files import read_json, write_json


@dataclass(frozen=True, kw_only=True, repr=False)
class Certificate:
    """What ``offramp calibrate`` writes. Made by ``certify``; ``sha256`` is over all the rest."""

    model_sha256: str
    corpus_sha256: str
    risk: str
    epsilon: float
    "What the risk is at most: a share of tokens, or nats a token."
    delta: float | None
    "How often the promise may fail over draws of the text; None for conformal risk control."
    method: str
    "ltt or crc."
    confidence: str
    missing_kv: str
    n: int
    "Sequences that it was calibrated on."
    thresholds: tuple[float, ...]
    "One for each exit but the last; inf never lets a token leave."
    p_values: tuple[float, ...] | None
    "Of each step of the path; None for conformal risk control."
    expected_compute_pct: float
    expected_flops_pct: float | None
    assumptions: dict[str, Any]
    "What the promise rests on, and what it does not cover."
    sha256: str = ""

    def __repr__(self) -> str:
        chosen = ", ".join(f"{value:g}" for value in self.thresholds)
        return (
            f"Certificate({self.risk} at most {self.epsilon:g}: {self.confidence} thresholds "
            f"{chosen}, Compute% {self.expected_compute_pct:.1f}, {self.n:,} sequences)"
        )

    def signed(self) -> "Certificate":
        """The same with its sha256."""
        return replace(self, sha256=_digest(self))

    @property
    def is_full_model(self) -> bool:
        """Nothing was certified: no token leaves early."""
        return all(threshold == float("inf") for threshold in self.thresholds)

    @property
    def bound(self) -> float:
        """What the token's loss is clipped at: nats, or 1 for disagreement."""
        return float(self.assumptions["bound"])

    def require_model(self, model_sha256: str) -> None:
        """Raise a CertificateError unless the certificate is this model's."""
        check_model(self.model_sha256, model_sha256)

    def save(self, path: str | Path) -> None:
        """Write the certificate as JSON, whole or not at all."""
        write_json(Path(path), self.content())

    def content(self) -> dict[str, Any]:
        """As in JSON, where infinity is a word."""
        return {**asdict(self), "thresholds": finite_or_word(self.thresholds)}

    @classmethod
    def load(cls, path: Path) -> "Certificate":
        """Read what ``save`` wrote; CertificateError where it is no certificate, or was edited."""
        stored = read_json(path)
        names = [field.name for field in fields(cls)]
        if not isinstance(stored, dict) or sorted(stored) != sorted(names):
            raise CertificateError(f"{path}: expected a certificate with {', '.join(names)}")
        digest = hashlib.sha256(_canonical(stored)).hexdigest()
        if stored["sha256"] != digest:
            raise CertificateError(
                f"{path}: expected a certificate as it was written, but it was edited: its sha256 "
                f"is {digest}, and it says {stored['sha256']}"
            )
        p_values = stored["p_values"]
        return cls(
            **{
                **stored,
                "thresholds": tuple(float(value) for value in stored["thresholds"]),
                "p_values": None if p_values is None else tuple(p_values),
            }
        )


def check_model(of_file: str, of_model: str) -> None:
    """Raise a CertificateError unless a file's thresholds were found for this model."""
    if of_file != of_model:
        raise CertificateError(
            f"certificate: expected one for this model, sha256 {of_model}, got one for {of_file}"
        )


def finite_or_word(numbers: Sequence[float]) -> list[float | str]:
    """JSON has no infinity."""
    return [str(number) if math.isinf(number) else number for number in numbers]


def _digest(certificate: Certificate) -> str:
    return hashlib.sha256(_canonical(certificate.content())).hexdigest()


def _canonical(stored: dict[str, Any]) -> bytes:
    """Everything but the sha256, as JSON with sorted keys and no spaces, UTF-8."""
    rest = {name: value for name, value in stored.items() if name != "sha256"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
