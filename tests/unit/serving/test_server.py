"""Connections: clients that read nothing, send nothing, or leave; and the end of the server."""

import asyncio
import json
import os
import re
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from offramp.errors import ConfigError
from offramp.serving.app import make_app
from offramp.serving.config import ServeConfig
from offramp.serving.server import _Server, _settings, listen, run, url_of

BODY = {"prompt": "x", "max_tokens": 50, "stream": True}


@contextmanager
def server(service, **options):
    """Run a server in a thread; yield its port and its uvicorn server."""
    config = ServeConfig(port=0, **options)
    app, ready = make_app(service, config), threading.Event()
    bound = listen(config.host, config.port)
    running = _Server(_settings(app, config), ready.set)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve([bound])))
    thread.start()
    assert ready.wait(30)
    try:
        yield bound.getsockname()[1], running
    finally:
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def request(body, **headers):
    content = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
    lines += [f"content-length: {len(content)}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


@pytest.fixture
def connect():
    """Connect to a port, and send data."""
    made = []

    def make(port, data=b""):
        found = socket.create_connection(("127.0.0.1", port), timeout=20)
        made.append(found)
        found.sendall(data)
        return found

    yield make
    for each in made:
        each.close()


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def sends(connection, data):
    """Whether the other side takes the data."""
    try:
        connection.sendall(data)
    except TimeoutError:
        return True
    except OSError:
        return False
    return True


def ended(connection):
    """Whether the server closed the connection, in at most 20 s."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_client_that_stops_reading_loses_its_connection_and_harms_nobody(fake, connect):
    service = fake("abc" * 200, size=100_000)  # 60 MB, which no buffer holds
    with server(service, write_seconds=0.5) as (port, running):
        slow = connect(port, request(BODY))
        wait_for(lambda: service.asks)
        other = connect(port, b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert b" 200 " in other.recv(4096)
        wait_for(lambda: service.closed == 1)
        wait_for(lambda: len(running.server_state.connections) <= 1)
        assert ended(slow)


def test_a_client_that_reads_slowly_gets_everything(fake, connect):
    service = fake("abc" * 10, size=100_000)
    with server(service, write_seconds=1.0) as (port, _):
        slow = connect(port, request(BODY, connection="close"))
        found = b""
        while part := slow.recv(1 << 16):
            found += part
            time.sleep(0.002)
        assert found.count(b"finish_reason") == 31
        assert b"[DONE]" in found


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(fake, connect, stream):
    service = fake(hold=asyncio.Event())
    with server(service) as (port, _):
        gone = connect(port, request({**BODY, "stream": stream}))
        wait_for(lambda: service.asks)
        gone.close()
        wait_for(lambda: service.closed == 1)


def test_connections_that_send_no_whole_request_end(fake, connect):
    service = fake()
    with server(service, read_seconds=0.5) as (port, running):
        silent = connect(port)
        head = connect(port, b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n")
        body = connect(port, request(BODY)[:-5])
        assert ended(silent)
        assert ended(head)
        found = body.recv(4096)
        assert b"408" in found.partition(b"\r\n")[0]
        assert b"body: expected all of it within 0.5 seconds" in found + body.recv(4096)
        again = connect(port, b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
        assert b"200" in again.recv(4096)
        again.sendall(b"GET /healthz HTTP")  # and no more, on a connection that was used
        assert ended(again)
        wait_for(lambda: not running.server_state.connections)
    assert service.asks == []


def test_a_body_that_never_ends_is_refused_and_its_connection_ends(fake, connect):
    with server(fake(), read_seconds=0.5, max_body_bytes=1000) as (port, running):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        endless = connect(port, head + b"transfer-encoding: chunked\r\n\r\n")
        endless.settimeout(0.01)
        found, sent = b"", True
        while sent:
            sent = sends(endless, b"400\r\n" + b"x" * 1024 + b"\r\n")
            with suppress(OSError):
                found += endless.recv(4096)
        assert b"413" in found.partition(b"\r\n")[0]
        wait_for(lambda: not running.server_state.connections)


def test_a_body_of_10_mb_is_413_with_and_without_the_key(fake, connect):
    body = {"prompt": "x" * 10_000_000}
    service = fake()
    with server(service, api_key="secret") as (port, _):
        for headers, status in (({}, b"401"), ({"authorization": "Bearer secret"}, b"413")):
            connection = connect(port, request(body, **headers))
            assert connection.recv(4096).startswith(b"HTTP/1.1 " + status)
            connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")  # it goes on
            assert b"HTTP/1.1 200 OK" in connection.recv(4096)
    assert service.asks == []


@pytest.mark.parametrize(
    "data",
    [
        b"\0\1\2\3\r\n\r\n",
        b"GET / HTTX/1.1\r\n\r\n",
        b"GET /" + b"x" * 100_000,
        b"PRI * HTTP/2.0\r\n\r\n",
    ],
    ids=["bytes", "version", "long", "http2"],
)
def test_what_is_no_request_is_refused(fake, connect, data):
    with server(fake()) as (port, _):
        bad = connect(port, data)
        assert re.match(rb"HTTP/1.1 4\d\d ", bad.recv(4096))
        good = connect(port, b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
        assert b"200" in good.recv(4096)


def run_and_stop(service, *, signals=(signal.SIGTERM,), body=BODY, **options):
    """Run a server in this process until it stops; return what the client got, and the result.

    The signals come, one after another, once the service has a request. After the first, another
    request is sent.
    """
    config = ServeConfig(port=0, **options)
    app, seen = make_app(service, config), []
    bound = listen(config.host, config.port)

    def ask():
        with socket.create_connection(bound.getsockname(), timeout=20) as connection:
            connection.sendall(request(body, connection="close"))
            found = b""
            while part := connection.recv(1 << 16):
                found += part
        seen.append(found)

    def work():
        first = threading.Thread(target=ask)
        first.start()
        wait_for(lambda: service.asks)
        os.kill(os.getpid(), signals[0])
        wait_for(lambda: app.state.opened.draining)
        ask()
        for each in signals[1:]:
            os.kill(os.getpid(), each)
        if "grace" not in options:
            service.hold.set_from_thread()
        first.join(20)

    ready = threading.Thread(target=work)
    finished = run(app, bound, config, on_ready=ready.start)
    ready.join(20)
    refused, answer = seen
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert service.closed == len(service.asks) == 1
    return answer, finished


class Held(asyncio.Event):
    """An event that another thread sets."""

    async def wait(self):
        self.loop = asyncio.get_running_loop()
        return await super().wait()

    def set_from_thread(self):
        self.loop.call_soon_threadsafe(self.set)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stream", [False, True])
def test_open_requests_finish_and_new_ones_get_503(fake, number, stream):
    service, body = fake(hold=Held()), {**BODY, "stream": stream}
    answer, finished = run_and_stop(service, signals=(number,), body=body)
    assert finished
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"finish_reason":"length"' in answer


@pytest.mark.parametrize(
    ("signals", "grace"),
    [((signal.SIGTERM,), 0.1), ((signal.SIGINT, signal.SIGINT), 60.0)],
    ids=["after the grace time", "at a second signal"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_finish_gets_an_error(fake, signals, grace, stream):
    body = {**BODY, "stream": stream}
    answer, finished = run_and_stop(fake(hold=Held()), signals=signals, body=body, grace=grace)
    assert not finished
    assert answer.startswith(b"HTTP/1.1 200 " if stream else b"HTTP/1.1 503 ")
    assert b"server: expected one that runs, but it stops" in answer


def test_the_address():
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert url_of(bound) == f"http://127.0.0.1:{port}"
        bound.listen()
        with pytest.raises(ConfigError, match=f"port: expected one that is free.*got {port}"):
            listen("127.0.0.1", port)
    for host in ("nowhere.invalid", "", "x" * 5000, "a\nb", "1.2.3.4.5"):
        with pytest.raises(ConfigError, match="host: expected an address of this machine"):
            listen(host, 0)
    with pytest.raises(ConfigError, match=r"port: expected one that is free at 192\.0\.2\.1"):
        listen("192.0.2.1", 0)
