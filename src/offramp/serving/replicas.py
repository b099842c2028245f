"""Replicas of a model on a Ray cluster, as one ``Service``: Ray Serve starts, checks and replaces
them.

The HTTP side stays in this process. A replica is a process of the cluster with a model and an
engine of its own; what it answers comes as a stream of the same values as from an engine here.
"""

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

from offramp.errors import ConfigError, OfframpError, QueueFullError
from offramp.serving.values import Ask, Load, ModelInfo, Piece, Service, Started, UnavailableError

logger = logging.getLogger("offramp.serving")
DEPLOYMENT = "Replica"
"""Name of the deployment in the application of Ray Serve."""
ANSWER_SECONDS = 5.0
"""Seconds to wait for a connection to the cluster's address."""
CHECK_SECONDS = 1.0
"""Seconds between two questions how many replicas run."""


def lost() -> UnavailableError:
    """The error of a request whose replica is lost."""
    return UnavailableError(
        "replica: expected one that answers to the end, but it was lost; send the request again"
    )


class Replica:
    """A model and its engine in a process of the cluster."""

    async def __init__(self, make: Callable[[], Service]) -> None:  # type: ignore[misc]
        self._service: Service | None = None
        self._error: OfframpError | None = None
        try:
            self._service = await asyncio.to_thread(make)
            await self._service.start()
        except OfframpError as error:  # a user's mistake, which another try does not mend
            self._error = error

    def about(self) -> ModelInfo | OfframpError:
        """What the API says of the model, or why there is none."""
        if self._service is None:
            return self._error or ConfigError("replica: expected a model, got none")
        return self._service.about

    async def answer(self, ask: Ask) -> AsyncGenerator[Started | Piece | OfframpError, None]:
        """Generate a text; an error comes as the last value, and stays what it is."""
        try:
            if self._service is None:
                raise lost()
            async for part in self._service.answer(ask):
                yield part
        except OfframpError as error:
            yield error

    def check_health(self) -> None:
        """Raise an error if the engine has ended; Ray then replaces the replica."""
        if self._service is not None and not self._service.load().healthy:
            raise RuntimeError("the engine has ended")


class RayService:
    """Answers with replicas on a Ray cluster, to which ``deploy`` connects."""

    def __init__(
        self,
        name: str,
        handle: Any,
        about: ModelInfo,
        *,
        replicas: int,
        slots: int,
        waiting: int,
    ) -> None:
        self._name, self._handle = name, handle.options(stream=True)
        self._about = about
        self._replicas = replicas
        self._slots, self._waiting = replicas * slots, replicas * waiting
        self._open = 0
        self._running = replicas
        self._watch: asyncio.Task[None] | None = None

    @property
    def about(self) -> ModelInfo:
        """The model, as the API describes it."""
        return self._about

    async def start(self) -> None:
        """Begin to watch the replicas."""
        self._watch = asyncio.create_task(self._watched())

    async def close(self) -> None:
        """End the replicas; what still runs fails with UnavailableError."""
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.to_thread(_end, self._name)

    def load(self) -> Load:
        """How many requests run and wait; healthy while a replica runs."""
        running = min(self._open, self._slots)
        return Load(running=running, waiting=self._open - running, healthy=self._running > 0)

    async def answer(self, ask: Ask) -> AsyncGenerator[Started | Piece, None]:
        """Generate a text; see ``Service.answer``. A lost replica is an UnavailableError."""
        if self._open >= self._slots + self._waiting:
            raise QueueFullError(
                f"queue: expected at most {self._waiting} waiting requests, got one more; "
                "try again when one is done"
            )
        self._open += 1
        parts, ended = self._handle.answer.remote(ask), False
        try:
            async for part in parts:
                if isinstance(part, OfframpError):
                    ended = True
                    raise part
                ended = isinstance(part, Piece) and part.end is not None
                yield part
            if not ended:
                raise lost()
        except _failures() as error:
            ended = True
            logger.warning("a replica was lost: %s", type(error).__name__)
            raise lost() from None
        finally:
            self._open -= 1
            if not ended:  # in a thread: it may wait for the replica
                _ = asyncio.get_running_loop().run_in_executor(None, _cancel, parts)

    async def _watched(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                self._running = await asyncio.to_thread(_count_running, self._name)
            except Exception:
                logger.exception("the state of the replicas is not known")
                self._running = 0


def check_cluster(address: str) -> None:
    """Raise ConfigError where Ray Serve is not installed or no cluster answers."""
    host, colon, port = address.rpartition(":")
    if address != "auto" and (not (host and colon and port.isdecimal()) or "/" in host):
        raise ConfigError(
            f"ray: expected auto or HOST:PORT on a machine of the cluster, got {address!r}"
        )
    try:
        from ray import serve  # noqa: F401
    except ImportError:
        raise ConfigError(
            'ray: expected Ray Serve; install it by pip install "offramp[serve-ray]"'
        ) from None
    if address == "auto":
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError, ValueError):
        raise ConfigError(
            f"ray: expected the address of a Ray cluster, but nothing answers at {address}"
        ) from None


def deploy(
    make: Callable[[], Service],
    *,
    address: str,
    replicas: int,
    threads: int,
    slots: int,
    waiting: int,
) -> RayService:
    """Start the replicas, and wait until all have opened their model.

    ``make`` opens the model in a replica; it and what it holds are sent there. Raises the error of
    a model that cannot be opened, and ConfigError if the cluster has no room for the replicas.
    """
    check_cluster(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).partition("Traceback")[0].split())
        raise ConfigError(
            f"ray: expected a Ray cluster to connect to at {address}, got: {said}"
        ) from None
    name = f"offramp-{uuid.uuid4().hex[:12]}"
    try:
        _require_room(ray, replicas, threads)
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(
            name=DEPLOYMENT,
            num_replicas=replicas,
            ray_actor_options={"num_cpus": threads},
            max_ongoing_requests=slots + waiting,
            graceful_shutdown_timeout_s=1,
            health_check_period_s=2,
            health_check_timeout_s=30,
        )(Replica)
        handle = serve.run(deployment.bind(make), name=name, route_prefix=None)
        about = handle.about.remote().result()
        if isinstance(about, OfframpError):
            raise about
    except BaseException as error:
        _end(name)
        if isinstance(error, (RuntimeError, ray.exceptions.RayError)):
            said = " ".join(str(error).split())[:300]
            raise ConfigError(f"ray: expected replicas that start, got: {said}") from None
        raise
    return RayService(name, handle, about, replicas=replicas, slots=slots, waiting=waiting)


def _require_room(ray: Any, replicas: int, threads: int) -> None:
    free = sum(
        int(node["Resources"].get("CPU", 0) // threads) for node in ray.nodes() if node["Alive"]
    )
    if free < replicas:
        raise ConfigError(
            f"replicas: expected at most {free}, for which the cluster has cores at {threads} "
            f"each, got {replicas}"
        )


def _count_running(name: str) -> int:
    from ray import serve

    application = serve.status().applications.get(name)
    if application is None:
        return 0
    states = application.deployments[DEPLOYMENT].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


def _end(name: str) -> None:
    import ray
    from ray import serve

    try:
        serve.delete(name)
    except Exception:  # the cluster itself may have gone
        logger.warning("the replicas could not be ended")
    ray.shutdown()


def _cancel(parts: Any) -> None:
    try:
        parts.cancel()
    except Exception as error:  # it has ended in the meantime
        logger.debug("a request could not be cancelled: %s", error)


def _failures() -> tuple[type[BaseException], ...]:
    """The errors of a call whose replica is lost."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    return (RayError, RayServeException)
