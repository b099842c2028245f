"""What an audit of exits has found so far: two risks, each with a bound that holds at all times."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp.calibration.audit import Audit
from offramp.calibration.promise import DEFAULT_BOUND, DEFAULT_DELTA
from offramp.errors import CheckpointError, ConfigError
from offramp.generation.auditing import Auditor, Comparison
from offramp.reading import read_json
from offramp.schema import shown

RISKS = ("disagreement", "nll-gap")
FORMAT = 1


@dataclass(kw_only=True)
class AuditLog:
    """The audits of the risks of tokens that left early, given the model's own text before them.

    ``disagreement`` is 1 where the last layer's likeliest token is another one. ``nll-gap`` is by
    how many nats the exit's likeliest token is less likely at the last layer than that layer's own,
    clipped to 1 nat. Each bound may ever fail with probability ``delta``.
    """

    share: float
    delta: float = DEFAULT_DELTA
    audits: dict[str, Audit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for risk in RISKS:
            self.audits.setdefault(risk, Audit(share=self.share, delta=self.delta))

    def auditor(self, *, seed: int = 0) -> Auditor:
        """Return an auditor that records into this log.

        Its coins depend on ``seed`` and on the number of tokens so far, so that a log that goes on
        gets new ones.
        """
        seen = self.audits[RISKS[0]].tokens
        return Auditor(share=self.share, record=self.record, seed=(seed, seen))

    def record(self, left: bool, found: Comparison | None) -> None:
        """Record a token: whether it left early, and what its audit found, if it had one."""
        losses = None if found is None else _losses(found)
        for risk, audit in self.audits.items():
            if not left:
                audit.ran_whole()
            elif losses is None:
                audit.left()
            else:
                audit.audited_loss(losses[risk])

    def content(self) -> dict[str, Any]:
        """Return the counts, and the estimate and bounds of each risk."""
        first = self.audits[RISKS[0]]
        return {
            "share": self.share,
            "delta": self.delta,
            "tokens": first.tokens,
            "tokens_left": first.tokens_left,
            "audited": first.audited,
            **{
                risk: {
                    "estimate": audit.estimate,
                    "lower_left": audit.lower_left,
                    "upper_left": audit.upper_left,
                    "upper": audit.upper,
                }
                for risk, audit in self.audits.items()
            },
        }

    def sentence(self) -> str:
        """Return what the audit found, for people."""
        audit = self.audits["disagreement"]
        seen = (
            f"Audit: {audit.audited:,} of the {audit.tokens_left:,} tokens that exited were run to "
            "the end, too"
        )
        if not audit.audited:
            return f"{seen}, so nothing is known of them."
        return (
            f"{seen}; there the last layer predicts another token for "
            f"{100 * (audit.estimate or 0):.1f}%. Of all {audit.tokens:,} tokens at most "
            f"{100 * audit.upper:.1f}% are expected to, on average: a bound for all times "
            f"together, at level {self.delta:g}."
        )

    def state(self) -> dict[str, Any]:
        """Return everything that a later run needs to go on; it fits into JSON."""
        audits = {risk: audit.state() for risk, audit in self.audits.items()}
        return {"format": FORMAT, "share": self.share, "delta": self.delta, "audits": audits}

    @classmethod
    def load(cls, state: Any) -> "AuditLog":
        """Return the log with this state. Raises ConfigError for any other content."""
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            got = state.get("format") if isinstance(state, dict) else state
            raise ConfigError(f"format: expected {FORMAT} of an audit, got {shown(got)}")
        audits = state.get("audits")
        if not isinstance(audits, dict) or set(audits) != set(RISKS):
            raise ConfigError(f"audits: expected {' and '.join(RISKS)}, got {shown(audits)}")
        loaded = {risk: Audit.load(audits[risk]) for risk in RISKS}
        shares = {(audit.share, audit.delta) for audit in loaded.values()}
        if len(shares) > 1:
            raise ConfigError("audits: expected one share and one delta, got several")
        [(share, delta)] = shares
        return cls(share=share, delta=delta, audits=loaded)


def open_log(share: float, path: Path | None) -> AuditLog:
    """Return a new log, or that of a file which goes on.

    Raises CheckpointError for any other file, and ConfigError for a log of another share.
    """
    if path is None or not path.exists():
        return AuditLog(share=share)
    try:
        log = AuditLog.load(read_json(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if log.share != share:
        raise ConfigError(f"audit: expected {log.share:g}, the share of {path}, got {share:g}")
    return log


def _losses(found: Comparison) -> dict[str, float]:
    gap = min(found.nll_gap, DEFAULT_BOUND) / DEFAULT_BOUND
    return {"disagreement": float(found.disagrees), "nll-gap": gap}
