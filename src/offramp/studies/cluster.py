"""Training runs on a Ray cluster; Ray schedules and retries them.

The cluster's machines need offramp installed but no shared file system: a run's files are sent
back as bytes, and its folder appears here when it is complete, as with local processes.
"""

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from offramp.errors import ConfigError, TrainingError
from offramp.studies.runs import Run, missing_of, new_run

RETRIES = 5
"""Number of times that a run is restarted after its worker died."""
ANSWER_SECONDS = 5.0
"""Seconds to wait for a connection to the cluster's address."""


def run_on_ray(
    runs: Sequence[Run],
    folder: Path,
    *,
    address: str,
    threads: int,
    on_done: Callable[[str], None],
) -> None:
    """Do the runs that have no folder yet, on all of the cluster, with ``threads`` cores each.

    ``address`` is ``auto`` or HOST:PORT on a machine of the cluster, ray://HOST:PORT elsewhere.
    On KeyboardInterrupt the runs in progress are dropped and the finished ones are kept.
    """
    missing = missing_of(runs, folder, on_done)
    if not missing:
        return
    ray = _connected(address)
    try:
        work = ray.remote(_work).options(num_cpus=threads, max_retries=RETRIES)
        every = ray.put(missing)  # one object, so that their common text is sent once
        pending = {work.remote(every, place, threads): run for place, run in enumerate(missing)}
        while pending:
            done, _ = ray.wait(list(pending), timeout=1.0)
            for reference in done:
                name = pending.pop(reference).name
                _unpack(_result(ray, reference), folder, name)
                on_done(name)
    finally:
        ray.shutdown()  # which ends this driver's tasks


def check_cluster(address: str, *, threads: int) -> None:
    """Raise ConfigError where Ray is not installed or no cluster with enough cores answers."""
    try:
        metadata.version("ray")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "ray: expected Ray to be installed, but it is not: pip install 'offramp[ray]'"
        ) from None
    if address != "auto":
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if not (host and colon and port.isdigit()):
            raise ConfigError(f"ray: expected auto, HOST:PORT or ray://HOST:PORT, got {address!r}")
        try:
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        except (OSError, OverflowError, UnicodeError):
            raise ConfigError(
                f"ray: expected the address of a Ray cluster, but nothing answers at {address}"
            ) from None
    ray = _connected(address)
    most = max(
        (node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0
    )
    ray.shutdown()
    if most < threads:
        raise ConfigError(
            f"threads: expected at most {most:g}, the cores of the cluster's largest node, "
            f"got {threads}"
        )


def _connected(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).partition("Traceback")[0].split())
        raise ConfigError(
            f"ray: expected a Ray cluster to connect to at {address}, got: {said}"
        ) from None
    return ray


def _work(runs: Sequence[Run], place: int, threads: int) -> dict[str, bytes]:
    """Do one of the runs on a worker, and return its files by name."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs[place].work(folder, on_step=lambda _: None, should_stop=lambda: False)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _result(ray: Any, reference: Any) -> dict[str, bytes]:
    """The files of a run; raises the run's own error where it failed."""
    try:
        found: dict[str, bytes] = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise TrainingError(
            f"ray: expected the cluster to finish a run, but it did not in {RETRIES} retries: "
            f"{' '.join(str(error).split())}"
        ) from None
    return found


def _unpack(files: dict[str, bytes], folder: Path, name: str) -> None:
    with new_run(folder, name) as aside:
        for path, content in files.items():
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            (aside / path).write_bytes(content)
