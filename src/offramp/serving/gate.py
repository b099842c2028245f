"""What stands before the API: the key, the host's name, and whether the server still takes work."""

import asyncio
import hmac
from collections.abc import Collection
from hashlib import sha256

from starlette.types import ASGIApp, Receive, Scope, Send

from offramp.serving.errors import HTTPError


class Open:
    """The requests to generate that are open, and whether new ones are taken."""

    def __init__(self) -> None:
        self.count = 0
        self.draining = False
        self.cut = asyncio.Event()
        "Set when open requests end at once."
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        self.count += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count:
            self._idle.set()

    async def idle(self, seconds: float) -> bool:
        """Wait until no request is open, at most so long; return whether none is."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True


class Gate:
    """An ASGI app before the server's own.

    Without ``api_key`` nobody needs one. ``hosts`` are the names by which requests may call the
    server, or None for any: a web page that calls a server without a key by a name of its own
    (DNS rebinding) is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        opened: Open,
        api_key: str | None,
        hosts: Collection[str] | None,
    ) -> None:
        self.app, self.opened, self.hosts = app, opened, hosts
        self.key = None if api_key is None else sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if (error := self._refusal(scope["path"], headers)) is not None:
            await error.response()(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"].startswith("/v1/"):
            if self.opened.draining:
                await draining().response()(scope, receive, send)
                return
            with self.opened:
                await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> HTTPError | None:
        if self.hosts is not None and _name(headers.get(b"host", b"")) not in self.hosts:
            return HTTPError(
                403,
                f"host: expected {' or '.join(sorted(self.hosts))}, since the server has no key, "
                "got another name",
            )
        if self.key is None or not (path.startswith("/v1/") or path == "/metrics"):
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        same = hmac.compare_digest(sha256(given.strip()).digest(), self.key)
        if kind.lower() == b"bearer" and same:
            return None
        return HTTPError(
            401,
            "api_key: expected the server's key as Authorization: Bearer KEY, got "
            f"{'another one' if given else 'none'}",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def draining() -> HTTPError:
    """Return the answer to requests that come while the server stops."""
    return HTTPError(
        503,
        "server: expected one that runs, but it stops; try again later",
        code="unavailable",
        headers={"retry-after": "5"},
    )


def _name(host: bytes) -> str:
    """Return the name in a Host header, without its port."""
    written = host.decode("latin-1").lower()
    if written.startswith("["):
        return written.partition("]")[0].removeprefix("[")
    return written.partition(":")[0]
