"""Run the app on a socket: uvicorn, connections that are watched, and a graceful stop."""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from offramp.errors import ConfigError
from offramp.serving.config import ServeConfig, addresses_of
from offramp.serving.gate import Open

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
HEADER_BYTES = 32 << 10
"""Largest head of a request."""
LAST_WORDS = 3.0
"""Seconds in which requests that are cut off send their error."""
MOST_CONNECTIONS = 4096


def listen(host: str, port: int) -> socket.socket:
    """Return a socket at an address, which does not listen yet.

    Raises ConfigError if the address is not this machine's, or the port is in use.
    """
    family, kind, protocol, _, address = addresses_of(host, port)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"port: expected one that is free at {host}, got {port}: {error.strerror}"
        ) from None
    return found


def url_of(bound: socket.socket) -> str:
    """Return the address of a socket as a browser takes it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def hosts_of(config: ServeConfig) -> tuple[str, ...] | None:
    """Return the names by which requests may call a server without a key; None for any."""
    if config.api_key is not None:
        return None
    return tuple(dict.fromkeys(("localhost", "127.0.0.1", "::1", config.host.lower())))


def run(
    app: FastAPI, bound: socket.socket, config: ServeConfig, *, on_ready: Callable[[], None]
) -> bool:
    """Serve until SIGTERM or Ctrl-C; return whether all requests could finish.

    Then no new request is taken, those that are open have ``grace`` seconds to finish, and the
    rest ends with an error. A second signal does not wait for them. ``on_ready`` is called once
    the server listens.
    """
    return asyncio.run(_run(app, bound, config, on_ready))


async def _run(
    app: FastAPI, bound: socket.socket, config: ServeConfig, on_ready: Callable[[], None]
) -> bool:
    server = _Server(_settings(app, config), on_ready)
    opened: Open = app.state.opened
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(server.serve([bound]))
    try:
        await _first(serving, stop.wait())
        opened.draining = True
        await _first(serving, opened.idle(config.grace), hurry.wait())
        finished = not opened.count
        opened.cut.set()
        await _first(serving, opened.idle(LAST_WORDS))
        server.should_exit = True
        await serving
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
    return finished


async def _first(serving: "asyncio.Task[None]", *others: Any) -> None:
    """Wait until one of several has ended. Raises what the server raises."""
    tasks = [asyncio.ensure_future(other) for other in others]
    try:
        await asyncio.wait((serving, *tasks), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _settings(app: FastAPI, config: ServeConfig) -> uvicorn.Config:
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, MOST_CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    else:
        wanted = MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else soft

    def protocol(**options: Any) -> WatchedProtocol:
        return WatchedProtocol(limits=config, **options)

    return uvicorn.Config(
        app,
        http=protocol,  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        limit_concurrency=max(16, min(wanted, MOST_CONNECTIONS) - 64),
        h11_max_incomplete_event_size=HEADER_BYTES,
    )


class _Server(uvicorn.Server):
    """Uvicorn's server, whose signals ``_run`` handles."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals as they are."""
        yield


class WatchedProtocol(H11Protocol):
    """A connection that ends if its client neither sends a whole request nor takes its answer."""

    def __init__(self, *, limits: ServeConfig, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; every byte that the client has not taken counts as one that it must."""
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        self._watch_reading()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._watch_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of one that was refused."""
        super().on_response_complete()
        self._watch_reading()

    def pause_writing(self) -> None:
        """Watch a client that does not take what was sent."""
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._writing = self.loop.call_later(self._limits.write_seconds, self._stalled)

    def resume_writing(self) -> None:
        """The client has taken everything."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _stalled(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= self._unsent:
            self.transport.abort()
            return
        self._unsent = left
        self._writing = self.loop.call_later(self._limits.write_seconds, self._stalled)

    def _watch_reading(self) -> None:
        """Watch the time while a head, or a body that nobody reads, is not complete.

        Between requests uvicorn's own time for idle connections counts.
        """
        theirs, ours = self.conn.their_state, self.conn.our_state
        head = theirs is h11.IDLE and self.timeout_keep_alive_task is None
        unread = theirs is h11.SEND_BODY and ours is h11.DONE
        if head or unread:
            if self._reading is None:
                seconds = self._limits.read_seconds
                self._reading = self.loop.call_later(seconds, self._late)
        elif self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _late(self) -> None:
        self.transport.abort()
