"""offramp serve."""

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from offramp.calibration.thresholds import StoredThresholds, load_thresholds
from offramp.cli.base import (
    UNTRAINED,
    Base,
    Bos,
    BosName,
    Device,
    Exits,
    Model,
    Precision,
    Threads,
    Weights,
    open_for,
    say,
    use,
)
from offramp.cli.interrupts import work_begins
from offramp.errors import ConfigError
from offramp.models.native.schemes import Scheme
from offramp.options import check_processes
from offramp.serving.config import ServeConfig

if TYPE_CHECKING:
    from offramp.commands.audit import AuditLog
    from offramp.serving.engine_service import EngineService
    from offramp.serving.values import Service

API_KEY = "OFFRAMP_API_KEY"
DEFAULTS = ServeConfig()


def serve(
    model: Model,
    config: Annotated[ServeConfig, Parameter(name="*")] = DEFAULTS,
    *,
    certificate: Path | None = None,
    replicas: int | None = None,
    ray: str | None = None,
    base: Base = None,
    exits: Exits = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Precision | None = None,
    weights: Weights = None,
) -> None:
    """Serve a model by OpenAI's HTTP API, with a page at / and metrics.

    Parameters
    ----------
    certificate
        No request may go below the thresholds in this file of ``offramp calibrate``, or name
        another confidence; a request that names no threshold gets these.
    replicas
        Number of processes on the Ray cluster that each open the model (default: 1).
    ray
        Answer by replicas on the Ray cluster at this address: auto, or HOST:PORT, on a machine of
        the cluster. The limits of slots and waiting requests are those of each replica.
    dtype
        Precision of the model (default: that of the certificate, or of the model's files).
    """
    check_installed()
    config = replace(config, api_key=config.api_key or os.environ.get(API_KEY) or None)
    config.require_key()
    check_replicas(replicas, ray, threads)
    if config.audit is not None and ray is not None:
        raise ConfigError("audit: expected none with --ray, whose replicas would each have one")
    opening = Opening(
        model=model if ray is None else _anywhere(model),
        config=replace(config, api_key=None),  # only this process needs the key
        stored=None if certificate is None else load_thresholds(certificate),
        base=base if ray is None or base is None else _anywhere(base),
        exits=exits,
        bos=bos,
        device=device,
        threads=threads,
        dtype=dtype,
        weights=weights,
    )
    from offramp.commands.audit import AuditLog
    from offramp.serving.app import make_app
    from offramp.serving.server import hosts_of, listen, run, url_of

    work_begins()
    with listen(config.host, config.port) as bound:
        log = None
        if config.audit is not None:
            promise, risk = config.keep_promise, config.promise_risk
            log = AuditLog(share=config.audit, keep_promise=promise, promise_risk=risk)
        service = service_of(replace(opening, audit=log), ray, replicas)
        app = make_app(service, config, hosts=hosts_of(config), audit=log)

        def ready() -> None:
            print(f"Serving {service.about.id} at {url_of(bound)}", flush=True)

        if not run(app, bound, config, on_ready=ready):
            say("Some requests did not finish in time.")


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How a model is opened and its engine made: here, or in a process of a Ray cluster."""

    model: Path
    config: ServeConfig
    stored: StoredThresholds | None
    base: Path | None
    exits: Exits
    bos: BosName
    device: str
    threads: int | None
    dtype: Precision | None
    weights: Scheme | None
    audit: "AuditLog | None" = None

    def __call__(self) -> "EngineService":
        """Open the model, and make the service."""
        use(self.device, self.threads)
        from offramp.commands.audit import check_trained
        from offramp.serving.engine_service import EngineService

        opened = open_for(
            self.model,
            base=self.base,
            exits=self.exits,
            bos=self.bos,
            device=self.device,
            dtype=self.dtype,
            weights=self.weights,
            stored=self.stored,
        )
        if self.audit is not None and self.audit.keep_promise is not None:
            check_trained(opened)
            say(self.audit.promise_note())
        if not opened.exits_trained and len(opened.model.exit_layers) > 1:
            say(f"{opened.name}: {UNTRAINED}.")
        return EngineService(opened, self.config, stored=self.stored, audit=self.audit)


def service_of(opening: Opening, ray: str | None, replicas: int | None) -> "Service":
    """The service that answers: an engine in this process, or replicas on a cluster."""
    if ray is None:
        return opening()
    from offramp.serving.replicas import deploy

    return deploy(
        opening,
        address=ray,
        replicas=replicas or 1,
        threads=opening.threads or 1,
        slots=opening.config.slots,
        waiting=opening.config.waiting,
    )


def check_replicas(replicas: int | None, ray: str | None, threads: int | None) -> None:
    """Raise a ConfigError for numbers of replicas that cannot be, and without a cluster."""
    if replicas is not None and replicas < 1:
        raise ConfigError(f"replicas: expected at least 1, got {replicas}")
    if replicas is not None and ray is None:
        raise ConfigError(f"replicas: expected --ray ADDRESS with it, got --replicas {replicas}")
    check_processes(threads=threads)
    if ray is not None:
        from offramp.serving.replicas import check_cluster

        check_cluster(ray)


def _anywhere(place: Path) -> Path:
    """Return a folder's whole path, which a process elsewhere finds; names stay as they are."""
    return place.resolve() if place.exists() else place


def check_installed() -> None:
    """Raise a ConfigError that names the extra if a library of the server is missing."""
    for library in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(library) is None:
            raise ConfigError(
                f"serve: expected {library.replace('_', '-')}, which is not installed; install "
                'it by pip install "offramp[serve]"'
            )
