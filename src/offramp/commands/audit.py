"""What an audit of exits has found so far: two risks, each with a bound that holds at all times.

A log may also keep a promise: it then chooses how boldly the next token may leave, from the bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp.calibration.audit import Audit
from offramp.calibration.change import RiskWatch
from offramp.calibration.keep_promise import PromiseKeeper, tokens_until_trust
from offramp.calibration.promise import DEFAULT_BOUND, DEFAULT_DELTA, RISKS
from offramp.calibration.share import check_keep_promise
from offramp.errors import CheckpointError, ConfigError
from offramp.generation.auditing import Auditor, Comparison
from offramp.generation.config import GenerateConfig
from offramp.generation.ladder import RUNGS
from offramp.models.open import OpenedModel
from offramp.reading import read_json
from offramp.schema import fitting, shown

FORMAT = 2


@dataclass(kw_only=True)
class AuditLog:
    """The audits of the risks of tokens that left early, given the model's own text before them.

    ``disagreement`` is 1 where the last layer's likeliest token is another one. ``nll-gap`` is by
    how many nats the exit's likeliest token is less likely at the last layer than that layer's own,
    clipped to 1 nat. Each bound may ever fail with probability ``delta``.

    ``watch`` counts alarms: the risk of audited tokens has left the range that it had before.

    Raises ConfigError for values out of range, and for a promise that a log does not keep.
    """

    share: float
    "Probability with which a token that exits is audited, in (0, 1]."
    delta: float = DEFAULT_DELTA
    keep_promise: float | None = None
    """Keep the mean risk of all tokens, those that ran whole included, at or below this number in
    (0, 1), except with probability ``delta``. Thresholds then follow the bound, and are never
    bolder than those that are asked for. None: they stay as they are."""
    promise_risk: str = "disagreement"
    "The risk that is promised and watched: disagreement, or nll-gap in nats per token."
    audits: dict[str, Audit] = field(default_factory=dict)
    keeper: PromiseKeeper | None = None
    "The state of the promise."
    watch: RiskWatch = field(default_factory=RiskWatch)

    def __post_init__(self) -> None:
        check_keep_promise(self.keep_promise, self.promise_risk, share=self.share)
        for risk in RISKS:
            self.audits.setdefault(risk, Audit(share=self.share, delta=self.delta))
        if self.keep_promise is not None and self.keeper is None:
            self.keeper = PromiseKeeper(epsilon=self.keep_promise, steps=RUNGS)

    @property
    def promised(self) -> Audit:
        """The audit of the risk that is promised and watched."""
        return self.audits[self.promise_risk]

    @property
    def rung(self) -> int:
        """How bold the next exit may be: from 0 (none) to RUNGS (as is asked for)."""
        return RUNGS if self.keeper is None else self.keeper.position(self.promised)

    def auditor(self, *, seed: int = 0) -> Auditor:
        """Return an auditor that records into this log.

        Its coins depend on ``seed`` and on the number of tokens so far, so that a log that goes on
        gets new ones.
        """
        return Auditor(
            share=self.share,
            record=self.record,
            seed=(seed, self.promised.tokens),
            rung=None if self.keeper is None else self._rung,
        )

    def _rung(self, pending: int) -> int:
        assert self.keeper is not None
        before = self.keeper.step
        rung = self.keeper.next_step(self.promised, pending=pending)
        if self.keeper.step != before:
            self.watch.learn()  # other thresholds have another risk
        return rung

    def record(self, left: bool, found: Comparison | None) -> None:
        """Record a token: whether it left early, and what its audit found, if it had one."""
        if found is None:
            for audit in self.audits.values():
                audit.left() if left else audit.ran_whole()
            return
        losses = _losses(found)
        for risk, audit in self.audits.items():
            audit.audited_loss(losses[risk])
        self.watch.observe(losses[self.promise_risk], tokens=self.promised.tokens)

    def content(self) -> dict[str, Any]:
        """Return the counts, the estimate and bounds of each risk, the promise and the alarms."""
        first, keeper = self.promised, self.keeper
        promise = {
            "risk": self.promise_risk,
            "epsilon": self.keep_promise,
            "rung": self.rung,
            "rungs": RUNGS,
        }
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
            "promise": None if keeper is None else promise,
            "alarms": self.watch.alarms,
            "last_alarm": self.watch.last_alarm,
        }

    def promise_note(self) -> str:
        """Return what is promised, and how long few tokens exit, for people."""
        epsilon = self.keep_promise
        assert epsilon is not None
        what = (
            f"at most {100 * epsilon:g}% of all new tokens are expected to differ from the last "
            "layer's prediction"
            if self.promise_risk == "disagreement"
            else f"the NLL gap of the likeliest token to the last layer, clipped to 1 nat, is at "
            f"most {epsilon:g} nats per new token"
        )
        said = f"Promise: on average {what}, at all times, at level {self.delta:g}."
        needed = tokens_until_trust(epsilon, self.share, self.delta)
        if self.promised.tokens >= needed:
            return said
        return (
            f"{said} The audit needs at least about {needed:,} tokens to show it; until then at "
            f"most {100 * epsilon:g}% of the tokens exit."
        )

    def sentence(self) -> str:
        """Return what the audit found, for people."""
        audit = self.audits["disagreement"]
        seen = (
            f"Audit: {audit.audited:,} of the {audit.tokens_left:,} tokens that exited were run to "
            "the end, too"
        )
        if not audit.audited:
            return f"{seen}, so nothing is known of them.{self._on_promise()}"
        return (
            f"{seen}; there the last layer predicts another token for "
            f"{100 * (audit.estimate or 0):.1f}%. Of all {audit.tokens:,} tokens at most "
            f"{100 * audit.upper:.1f}% are expected to, on average: a bound for all times "
            f"together, at level {self.delta:g}.{self._on_promise()}{self._on_alarms()}"
        )

    def _on_promise(self) -> str:
        if self.keeper is None:
            return ""
        return (
            f" The promise is {self.promise_risk} of at most {self.keep_promise:g}: the bound is "
            f"{self.promised.upper:.3g}, and thresholds are on rung {self.rung} of {RUNGS}."
        )

    def _on_alarms(self) -> str:
        watch = self.watch
        if not watch.alarms:
            return ""
        times = "once" if watch.alarms == 1 else f"{watch.alarms:,} times"
        return (
            f" The {self.promise_risk} of audited tokens left the range that it had before "
            f"{times}, last at token {watch.last_alarm:,}."
        )

    def state(self) -> dict[str, Any]:
        """Return everything that a later run needs to go on; it fits into JSON."""
        return {
            "format": FORMAT,
            "share": self.share,
            "delta": self.delta,
            "keep_promise": self.keep_promise,
            "promise_risk": self.promise_risk,
            "audits": {risk: audit.state() for risk, audit in self.audits.items()},
            "keeper": None if self.keeper is None else self.keeper.state(),
            "watch": self.watch.state(),
        }

    @classmethod
    def load(cls, state: Any) -> "AuditLog":
        """Return the log with this state. Raises ConfigError for any other content.

        A log of format 1 has neither a promise nor alarms.
        """
        format = state.get("format") if isinstance(state, Mapping) else state
        if isinstance(format, bool) or format not in (1, FORMAT):
            raise ConfigError(f"format: expected 1 or {FORMAT} of an audit, got {shown(format)}")
        audits = state.get("audits")
        if not isinstance(audits, Mapping) or set(audits) != set(RISKS):
            raise ConfigError(f"audits: expected {' and '.join(RISKS)}, got {shown(audits)}")
        log = fitting(cls, {name: state[name] for name in state if name != "format"})
        if {(audit.share, audit.delta) for audit in log.audits.values()} != {
            (log.share, log.delta)
        }:
            raise ConfigError("audits: expected one share and one delta, got several")
        keeper = log.keeper if state.get("keeper") else None
        kept = None if keeper is None else (keeper.epsilon, keeper.steps, keeper.credit)
        if kept != (None if log.keep_promise is None else (log.keep_promise, RUNGS, 0.0)):
            raise ConfigError(f"keeper: expected that of the promise, got {shown(keeper)}")
        return log


def open_log(
    share: float,
    path: Path | None,
    *,
    keep_promise: float | None = None,
    promise_risk: str = "disagreement",
) -> AuditLog:
    """Return a new log, or that of a file which goes on.

    Raises CheckpointError for any other file, and ConfigError for a log of another share or
    promise.
    """
    new = AuditLog(share=share, keep_promise=keep_promise, promise_risk=promise_risk)
    if path is None or not path.exists():
        return new
    try:
        log = AuditLog.load(read_json(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if log.share != share:
        raise ConfigError(f"audit: expected {log.share:g}, the share of {path}, got {share:g}")
    for name in ("keep_promise", "promise_risk") if keep_promise or log.keep_promise else ():
        own, given = getattr(log, name), getattr(new, name)
        if own != given:
            raise ConfigError(f"{name}: expected {own}, as in {path}, got {given}")
    return log


def check_audited(opened: OpenedModel, config: GenerateConfig, audit: AuditLog) -> None:
    """Raise a ConfigError if a text cannot keep the promise of a log."""
    if audit.keeper is None:
        return
    if config.speculative or config.threshold is None:
        got = "drafts, by which none exits" if config.speculative else "neither"
        raise ConfigError(f"keep_promise: expected a threshold or a certificate, got {got}")
    check_trained(opened)


def check_trained(opened: OpenedModel) -> None:
    """Raise a ConfigError unless the model has trained exits, by which a promise gains anything."""
    if len(opened.model.exit_layers) == 1:
        raise ConfigError(
            f"keep_promise: expected a model with an exit before its last layer, got {opened.name} "
            "without"
        )
    if not opened.exits_trained:
        raise ConfigError(
            f"keep_promise: expected a model with trained exits, got {opened.name}, whose exits "
            "are untrained"
        )


def _losses(found: Comparison) -> dict[str, float]:
    gap = min(found.nll_gap, DEFAULT_BOUND) / DEFAULT_BOUND
    return {"disagreement": float(found.disagrees), "nll-gap": gap}
