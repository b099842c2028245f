"""The answer to a request to generate, whole or as a stream of server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from offramp.errors import OfframpError
from offramp.serving.errors import HTTPError, http_error, json_response
from offramp.serving.forms import Form, Text
from offramp.serving.gate import Open, draining
from offramp.serving.metrics import Metrics
from offramp.serving.values import Ask, Piece, Service, Started

Answer = AsyncGenerator[Started | Piece, None]
EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
UNREAD_PIECES = 4
"""Number of pieces that wait for a client that reads slowly; the rest waits in the mailbox, where
it becomes one piece."""
LAST_WORDS = 2.0
"""Seconds in which a client must take the error that ends its stream."""


class Reply(Response):
    """Generates texts and sends them.

    The request ends early if its client leaves, if it takes longer than ``seconds``, or if the
    server stops; then its texts are cancelled.
    """

    def __init__(
        self,
        service: Service,
        asks: Sequence[Ask],
        form: Form,
        *,
        stream: bool,
        usage: bool,
        seconds: float,
        opened: Open,
        metrics: Metrics,
    ) -> None:
        super().__init__()
        self._service, self._asks, self._form = service, asks, form
        self._streams, self._usage, self._seconds = stream, usage, seconds
        self._opened, self._metrics = opened, metrics
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request. Raises HTTPError before anything was sent."""
        began = perf_counter()
        work = asyncio.create_task(self._work(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        cut = asyncio.create_task(self._opened.cut.wait())
        outcome = "left"
        try:
            await asyncio.wait(
                (work, gone, cut), timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED
            )
            error = await self._ended(work, gone, cut)
            if error is None:
                outcome = "left" if work.cancelled() else "done"
                return
            outcome = {503: "stopped", 504: "timeout"}.get(error.status, str(error.status))
            if not self._begun:
                raise error
            await asyncio.wait_for(_end_stream(send, error), LAST_WORDS)
        except (TimeoutError, ClientDisconnect, OSError):
            outcome = "left"
        finally:
            for task in (work, gone, cut):
                task.cancel()
            self._metrics.requests.labels(outcome).inc()
            if outcome == "done":
                self._metrics.seconds.observe(perf_counter() - began)

    async def _ended(
        self, work: asyncio.Task[None], gone: asyncio.Task[None], cut: asyncio.Task[Any]
    ) -> HTTPError | None:
        """End the work if something else came first; return the error to send, if any."""
        if not work.done():
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            if gone.done():
                return None
            if cut.done():
                return draining()
            return HTTPError(
                504,
                f"request: expected one that ends within {self._seconds:g} seconds, got a longer "
                "one",
                code="timeout",
            )
        try:
            work.result()
        except OfframpError as error:
            return http_error(error, retry_after=self._metrics.retry_after)
        return None

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = [self._service.answer(ask) for ask in self._asks]
        try:
            texts = [
                Text(prompt_tokens=started.prompt_tokens)
                for started in await _all(*(anext(answer) for answer in answers))
                if isinstance(started, Started)
            ]
            self._metrics.prompt_tokens.inc(sum(each.prompt_tokens for each in texts))
            if self._streams:
                await self._stream(send, answers, texts)
                return
            await _all(*(self._collect(*each) for each in zip(answers, texts, strict=True)))
            response = json_response(self._form.whole(texts))
            self._begun = True
            await response(scope, receive, send)
        finally:
            for answer in answers:
                await answer.aclose()

    async def _collect(self, answer: Answer, text: Text) -> None:
        async for piece in answer:
            assert isinstance(piece, Piece)
            self._take(piece, text)

    def _take(self, piece: Piece, text: Text) -> None:
        text.tokens += piece.tokens
        text.end = piece.end
        self._metrics.count(piece.tokens)
        if piece.end is not None:
            self._metrics.ended(piece.end, len(text.tokens))

    async def _stream(self, send: Send, answers: Sequence[Answer], texts: Sequence[Text]) -> None:
        self._begun = True
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        for index in range(len(texts)):
            await _send_events(send, self._form.beginning(index))
        pieces: asyncio.Queue[tuple[int, Piece | OfframpError]] = asyncio.Queue(UNREAD_PIECES)
        pumps = [asyncio.create_task(_pump(n, answer, pieces)) for n, answer in enumerate(answers)]
        try:
            running = len(pumps)
            while running:
                index, piece = await pieces.get()
                if not isinstance(piece, Piece):
                    raise piece
                self._take(piece, texts[index])
                events = [self._form.chunk(index, piece.tokens)] if piece.tokens else []
                if piece.end is not None:
                    events.append(self._form.last(index, piece.end))
                    running -= 1
                await _send_events(send, events)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        if self._usage:
            await _send_events(send, [self._form.usage(texts)])
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _pump(
    index: int, answer: Answer, pieces: asyncio.Queue[tuple[int, Piece | OfframpError]]
) -> None:
    """Put the pieces of a text into a queue, and the error that ends it."""
    try:
        async for piece in answer:
            assert isinstance(piece, Piece)
            await pieces.put((index, piece))
    except OfframpError as error:
        await pieces.put((index, error))


async def _all(*calls: Any) -> list[Any]:
    """Wait for all; raise the first error once all have ended."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


async def _gone(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_events(send: Send, events: Sequence[Any]) -> None:
    if events:
        body = b"".join(b"data: %b\n\n" % msgspec.json.encode(event) for event in events)
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _end_stream(send: Send, error: HTTPError) -> None:
    await _send_events(send, [error.content])
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
