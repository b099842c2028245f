"""The thread that owns the engine. The event loop talks to it by queues.

What the event loop wants goes through a queue, and is done between two steps. New tokens go back
once a step, into a ``Mailbox`` for each request: it holds the tokens that were not read yet, at
most all of one request.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from time import perf_counter

import torch

from offramp.errors import GenerationError, OfframpError
from offramp.generation.config import GenerateConfig
from offramp.generation.engine import Engine
from offramp.generation.requests import Request
from offramp.generation.rows import Token
from offramp.serving.values import Load, UnavailableError

logger = logging.getLogger("offramp.serving")
STEP_SECONDS = 30.0
"""Longest time of a step that is waited for when the server stops."""


class Mailbox:
    """What a request got and nobody has read yet. Only the event loop uses it."""

    def __init__(self) -> None:
        self.request: Request | None = None
        "The request, once the engine has it; it does not change any more once ``ended``."
        self.tokens: list[Token] = []
        self.ended = False
        "Whether nothing comes any more."
        self.error: OfframpError | None = None
        "Why it ended, if its text is not complete."
        self.submitted = self.first = self.last = perf_counter()
        "Moments at which it was submitted, and at which its first and its last token came."
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Wait until something came since the last time."""
        await self._changed.wait()
        self._changed.clear()

    def put(
        self,
        *,
        at: float,
        request: Request | None = None,
        tokens: list[Token] | None = None,
        ended: bool = False,
        error: OfframpError | None = None,
    ) -> None:
        """Add what came at a moment."""
        self.request = request or self.request
        if tokens:
            if self.first == self.submitted:
                self.first = at
            self.last = at
            self.tokens += tokens
        self.ended, self.error = self.ended or ended, self.error or error
        self._changed.set()


class Worker:
    """Steps an engine in a thread of its own for as long as requests wait or run.

    Make it, and call its methods, on the thread of the event loop.
    """

    def __init__(self, engine: Engine) -> None:
        self.load = Load(running=0, waiting=0)
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._boxes: dict[Request, Mailbox] = {}  # of the thread
        self._news: list[Callable[[], None]] = []  # of the thread
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: list[int], config: GenerateConfig, logprobs: int | None) -> Mailbox:
        """Hand a request to the engine; its mailbox tells what becomes of it."""
        box = Mailbox()
        self._inbox.put(partial(self._submit, box, prompt, config, logprobs))
        return box

    def cancel(self, box: Mailbox) -> None:
        """End a request, wherever it is."""
        self._inbox.put(partial(self._cancel, box))

    async def stop(self) -> None:
        """End the thread after the step that it is in; all requests fail.

        A step that does not end is not waited for.
        """
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, STEP_SECONDS)

    def _run(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # for the kernels of this thread, too
        try:
            while True:
                for task in self._tasks():
                    if task is None:
                        return
                    task()
                if self._engine.busy:
                    self._step()
                states = [request.state for request in self._boxes]
                waiting = states.count("waiting")
                self.load = Load(running=len(states) - waiting, waiting=waiting)
                self._tell()
        except BaseException:
            logger.exception("the engine's thread ended")
            raise
        finally:
            now = perf_counter()
            for box in self._boxes.values():
                self._news.append(partial(box.put, at=now, ended=True, error=stopped()))
            self.load = Load(running=0, waiting=0, healthy=False)
            self._tell()

    def _tasks(self) -> Iterator[Callable[[], None] | None]:
        """Yield what the event loop wants; wait for it if the engine has nothing to do."""
        wait = not self._engine.busy
        while True:
            try:
                yield self._inbox.get(block=wait)
            except Empty:
                return
            wait = False

    def _submit(
        self, box: Mailbox, prompt: list[int], config: GenerateConfig, logprobs: int | None
    ) -> None:
        now = perf_counter()
        try:
            request = self._engine.submit(prompt, config, logprobs=logprobs)
        except OfframpError as error:
            self._news.append(partial(box.put, at=now, ended=True, error=error))
        except Exception as error:
            logger.exception("a request could not be submitted")
            self._news.append(partial(box.put, at=now, ended=True, error=_broken(error)))
        else:
            self._boxes[request] = box
            self._news.append(partial(box.put, at=now, request=request))

    def _cancel(self, box: Mailbox) -> None:
        for request, own in list(self._boxes.items()):
            if own is box:
                self._engine.cancel(request)
                del self._boxes[request]

    def _step(self) -> None:
        tokens: dict[Request, list[Token]] = {}
        failed: OfframpError | None = None
        try:
            for event in self._engine.step():
                found = tokens.setdefault(event.request, [])
                if event.token is not None:
                    found.append(event.token)
        except Exception as error:  # the requests that had a slot have failed
            logger.exception("a step of the engine failed")
            failed = _broken(error)
        now = perf_counter()
        for request, box in list(self._boxes.items()):
            if request.done:
                del self._boxes[request]
            elif request not in tokens:
                continue
            why = request.error if failed is None else failed if request.done else None
            self._news.append(
                partial(
                    box.put,
                    at=now,
                    tokens=tokens.get(request),
                    ended=request.done,
                    error=why,
                )
            )

    def _tell(self) -> None:
        """Give the event loop what came, in one call."""
        news, self._news = self._news, []
        if news:
            try:
                self._loop.call_soon_threadsafe(_do, news)
            except RuntimeError:  # the event loop is closed
                logger.debug("nobody reads the last tokens")


def stopped() -> UnavailableError:
    """Return the error of a request that a server cannot answer any more."""
    return UnavailableError("server: expected one that runs, but it stops; try again later")


def _do(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _broken(error: Exception) -> GenerationError:
    kind = type(error).__name__
    return GenerationError(f"engine: expected a step that ends, got {kind}; see the server's log")
