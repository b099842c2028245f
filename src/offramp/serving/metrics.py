"""What Prometheus reads at /metrics."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from offramp.commands.audit import AuditLog
from offramp.serving.values import Ending, Load, NewToken

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass(frozen=True, eq=False)
class AuditFigures(Collector):
    """The alarms and the promise of an audit, as they are when Prometheus reads them."""

    log: AuditLog

    def collect(self) -> Iterator[Metric]:
        """Yield each figure."""
        log, keeper, name = self.log, self.log.keeper, "offramp_audit"
        yield CounterMetricFamily(
            f"{name}_alarms",
            "Times at which the risk of audited tokens left the range that it had before.",
            value=log.watch.alarms,
        )
        yield GaugeMetricFamily(
            f"{name}_last_alarm_tokens",
            "New tokens until the last alarm; 0 before the first.",
            value=log.watch.last_alarm or 0,
        )
        if keeper is None:
            return
        promise = GaugeMetricFamily(
            "offramp_promise", "The mean risk that is promised at most.", labels=["risk"]
        )
        promise.add_metric([log.promise_risk], keeper.epsilon)
        yield promise
        yield GaugeMetricFamily(
            "offramp_promise_rung",
            f"How bold exits are: 0 (none exits) to {keeper.steps} (as requests ask for).",
            value=log.rung,
        )


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self, load: Callable[[], Load], audit: AuditLog | None = None) -> None:
        self.registry = registry = CollectorRegistry()
        self._typical = 0.0
        self.prompt_tokens = Counter(
            "offramp_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.tokens = Counter("offramp_tokens", "New tokens.", registry=registry)
        self.exits = Counter(
            "offramp_exits",
            "New tokens by the layer after which they left.",
            ["exit_layer"],
            registry=registry,
        )
        self.requests = Counter(
            "offramp_requests",
            "Requests to generate by how they ended: done, left (the client went away), timeout, "
            "stopped, or the status of an error.",
            ["outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "offramp_request_seconds",
            "Time of a request that got its whole answer, from its body to its last token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "offramp_first_token_seconds",
            "Time from a request to its first token, waiting included.",
            buckets=SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "offramp_token_seconds",
            "Mean time of a token of a text after its first.",
            buckets=(0.001, 0.0025, 0.005, *SECONDS[:9]),
            registry=registry,
        )
        for name, said, read in (
            ("offramp_requests_running", "Texts that decode.", lambda: load().running),
            ("offramp_requests_waiting", "Texts that wait for a slot.", lambda: load().waiting),
        ):
            Gauge(name, said, registry=registry).set_function(read)
        if audit is not None:
            self._audited(audit)

    def _audited(self, log: AuditLog) -> None:
        upper = Gauge(
            "offramp_audit_upper",
            "Upper bound on the mean risk of all new tokens, at all times together.",
            ["risk"],
            registry=self.registry,
        )
        count = Gauge(
            "offramp_audited", "Tokens that exited and were run to the end.", registry=self.registry
        )
        for risk, audit in log.audits.items():
            upper.labels(risk).set_function(partial(getattr, audit, "upper"))
            count.set_function(partial(getattr, audit, "audited"))
        self.registry.register(AuditFigures(log))

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self.registry)

    def count(self, tokens: Iterable[NewToken]) -> None:
        """Count new tokens and their exits."""
        for token in tokens:
            self.tokens.inc()
            self.exits.labels(token.exit_layer).inc()

    @property
    def retry_after(self) -> int:
        """Seconds after which a slot may be free: about the time of a text, at most a minute."""
        return min(60, max(1, math.ceil(self._typical)))

    def ended(self, end: Ending, tokens: int) -> None:
        """Note the times of a complete text of so many tokens."""
        seconds = end.seconds_to_first_token + tokens / (end.tokens_per_s or math.inf)
        self._typical += 0.2 * (seconds - self._typical)
        self.first_token.observe(end.seconds_to_first_token)
        if end.tokens_per_s:
            self.token_seconds.observe(1 / end.tokens_per_s)
