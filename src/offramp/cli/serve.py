"""offramp serve."""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from offramp.calibration.thresholds import load_thresholds
from offramp.cli.base import (
    UNTRAINED,
    Base,
    Bos,
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
from offramp.errors import ConfigError
from offramp.serving.config import ServeConfig

API_KEY = "OFFRAMP_API_KEY"
DEFAULTS = ServeConfig()


def serve(
    model: Model,
    config: Annotated[ServeConfig, Parameter(name="*")] = DEFAULTS,
    *,
    certificate: Path | None = None,
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
    dtype
        Precision of the model (default: that of the certificate, or of the model's files).
    """
    check_installed()
    config = replace(config, api_key=config.api_key or os.environ.get(API_KEY) or None)
    config.require_key()
    stored = None if certificate is None else load_thresholds(certificate)

    use(device, threads)
    from offramp.serving.app import make_app
    from offramp.serving.engine_service import EngineService
    from offramp.serving.server import hosts_of, listen, run, url_of

    with listen(config.host, config.port) as bound:
        opened = open_for(
            model,
            base=base,
            exits=exits,
            bos=bos,
            device=device,
            dtype=dtype,
            weights=weights,
            stored=stored,
        )
        if not opened.exits_trained and len(opened.model.exit_layers) > 1:
            say(f"{opened.name}: {UNTRAINED}.")
        service = EngineService(opened, config, stored=stored)
        app = make_app(service, config, hosts=hosts_of(config))

        def ready() -> None:
            print(f"Serving {service.about.id} at {url_of(bound)}", flush=True)

        if not run(app, bound, config, on_ready=ready):
            say("Some requests did not finish in time.")


def check_installed() -> None:
    """Raise a ConfigError that names the extra if a library of the server is missing."""
    for library in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(library) is None:
            raise ConfigError(
                f"serve: expected {library.replace('_', '-')}, which is not installed; install "
                'it by pip install "offramp[serve]"'
            )
