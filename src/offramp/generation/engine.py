"""Decode many requests at once: rows join and leave between steps.

This is continuous batching (Orca, Yu et al. 2022). A request waits in a queue until a slot, which
is a row of the cache, is free; then its prompt runs, and from then on each step decodes a token of
every row. Each request has its own options: exits, sampling, seed, stop rules, drafts. The tokens
of a request are those that it gets alone: see promise.py for the precisions in which this holds.

The engine is synchronous and is used from one thread. ``generate`` and ``generate_batch`` are this
engine with as many slots as prompts.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count

from tokenizers import Tokenizer
from torch import Tensor

from offramp.errors import ConfigError, GenerationError, QueueFullError
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.auditing import Auditor, climbs, decode
from offramp.generation.confident_exit import ExitDecoder
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.exits import Exits, at_last_layer
from offramp.generation.prefill import PREFILL_CHUNK, Prefill
from offramp.generation.requests import Event, Job, Request, State, new_job
from offramp.generation.speculative import SpeculativeDecoder
from offramp.models.base import EarlyExitModel
from offramp.models.work import Work


class Engine:
    """Decodes requests, each in a slot of one cache.

    ``submit`` takes a request, ``step`` decodes a token of each row and returns the new tokens,
    and ``cancel`` ends a request. ``run`` steps until no request waits or runs.

    ``fitted`` holds the gates and temperatures that confidences read, and the draft vocabulary;
    ``tokenizer`` turns tokens into text. ``auditor`` runs a share of the tokens that leave early
    to the end, too; it changes no text, unless it has rungs. The cache is made at once.

    Raises UnsupportedArchitectureError for a model whose blocks cannot be run one by one.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        fitted: FittedExits = NOTHING_FITTED,
        auditor: Auditor | None = None,
    ) -> None:
        self.model, self.config = model, config or EngineConfig()
        self.tokenizer, self.fitted, self.auditor = tokenizer, fitted, auditor
        self.capacity = min(self.config.capacity, model.max_length)
        slots, wait = self.config.slots, self.config.max_wait
        cache = self.cache = model.make_cache(slots, self.capacity)
        self.work = Work()
        "The work of new tokens, without that of prompts."
        self._decoder = ExitDecoder(
            model, cache, batch_size=slots, max_wait=wait, work=self.work, climbs=climbs(auditor)
        )
        self._slots: list[Job | None] = [None] * slots
        self._used = [False] * slots
        self._queue: deque[Job] = deque()
        self._joining: deque[Job] = deque()
        self._jobs: dict[str, Job] = {}
        self._names = (f"request-{n}" for n in count())

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of all slots."""
        return self.cache.bytes

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._jobs)

    @property
    def requests(self) -> list[Request]:
        """The requests that wait or run, in the order in which they were submitted."""
        return [job.request for job in self._jobs.values()]

    def submit(
        self,
        prompt: Sequence[int] | Tensor,
        config: GenerateConfig | None = None,
        *,
        id: str | None = None,
        policy: ThresholdPolicy | GainPolicy | None = None,
        logprobs: int | None = None,
    ) -> Request:
        """Take a request; it runs in the following steps.

        ``prompt`` are token ids, at most ``capacity`` of them. A text that fills its slot ends
        there, with the finish reason "length". ``policy`` is used instead of a threshold. With
        ``logprobs`` each token has its log probability, and those of so many of the likeliest.

        Raises QueueFullError if no slot is free and as many requests wait as may; try again
        later. Raises ConfigError, as ``generate`` does, for a request that cannot run, and for an
        ``id`` that a request has which is not done. Nothing changes if it raises.
        """
        job = new_job(
            prompt,
            config or GenerateConfig(),
            model=self.model,
            tokenizer=self.tokenizer,
            capacity=self.capacity,
            fitted=self.fitted,
            policy=policy,
            logprobs=logprobs,
        )
        request = job.request
        if id is not None and id in self._jobs:
            raise ConfigError(f"id: expected one that no unfinished request has, got {id!r}")
        if len(self._queue) >= self.config.waiting + self._slots.count(None):
            raise QueueFullError(
                f"queue: expected at most {self.config.waiting} waiting requests, got one more; "
                "try again when one is done"
            )
        names = (name for name in self._names if name not in self._jobs)
        request.id = next(names) if id is None else id
        rules = (each.rule for each in self.requests if each.rule == request.rule)
        request.rule = next(rules, request.rule)
        self._jobs[request.id] = job
        self._queue.append(job)
        return request

    def step(self) -> list[Event]:
        """Decode the next token of each row, let requests join, and run parts of their prompts.

        Returns the new tokens and failures. A request whose logits or confidence are not finite
        fails alone. If anything else is raised, such as KeyboardInterrupt, the requests that have
        a slot fail, those that wait stay, and the engine can be used further.
        """
        events: list[Event] = []
        try:
            self._decode(events)
            self._admit()
            self._prefill(events)
        except BaseException as error:
            why = f"expected a step that ends, got {type(error).__name__}: {error}"
            for job in filter(None, list(self._slots)):
                self._end(job, "failed", GenerationError(f"request {job.request.id}: {why}"))
            raise
        return events

    def run(self) -> Iterator[Event]:
        """Step until no request waits or runs, and yield the events as they come."""
        while self.busy:
            yield from self.step()

    def cancel(self, request: Request | str) -> bool:
        """End a request, given by itself or by its id, wherever it is; its slot is free at once.

        Returns False if the engine has no such request, such as one that is done.
        """
        job = self._jobs.get(request if isinstance(request, str) else request.id)
        if job is None or not (isinstance(request, str) or job.request is request):
            return False
        self._end(job, "cancelled")
        return True

    def _decode(self, events: list[Event]) -> None:
        decoding = [job for job in self._slots if job and job.request.state == "decoding"]
        waiting = self._decoder.waiting
        plain = [job for job in decoding if job.drafts is None and job.slot not in waiting]
        if plain or waiting:
            last = [job.row.completion.tokens[-1].id for job in plain]
            exits = decode(self._decoder, last, [job.slot for job in plain], self.auditor)
            for slot, error in exits.errors.items():
                self._fail(self._at(slot), error, events)
            for n, slot in enumerate(exits.rows):
                self._choose(self._at(slot), exits, n, events)
        for job in decoding:
            if job.drafts is not None:
                self._speculate(job, job.drafts, events)

    def _admit(self) -> None:
        """Give free slots to the requests that wait, in their order."""
        while self._queue and None in self._slots:
            job = self._queue.popleft()
            slot = job.slot = self._slots.index(None)
            self._slots[slot] = job
            if self._used[slot]:
                self.cache.clear(slot)
            self._used[slot] = True
            rows = self._decoder.rows_of(slot)
            job.prefill = Prefill(self.model, self.cache, job.request.prompt, rows=rows)
            job.request.state = "prefill"
            self._joining.append(job)

    def _prefill(self, events: list[Event]) -> None:
        """Run parts of the prompts of the requests that joined, in their order."""
        if not self._joining:
            return
        tokens = math.inf if self.config.prefill_tokens is None else self.config.prefill_tokens
        if len(self._joining) == self.config.slots - self._slots.count(None):
            tokens = max(tokens, PREFILL_CHUNK)  # no row decodes that this could delay
        budget = tokens * self.model.num_layers
        while self._joining and budget > 0:
            job = self._joining[0]
            assert job.prefill is not None
            budget = job.prefill.run(budget)
            if job.prefill.logits is not None:
                self._joining.popleft()
                self._begin(job, job.prefill.logits, events)

    def _begin(self, job: Job, logits: Tensor, events: list[Event]) -> None:
        """Choose the first token of a row, whose prompt has run."""
        job.prefill = None
        job.request.state = "decoding"
        if job.draft_exit is not None:
            job.drafts = SpeculativeDecoder(
                self.model,
                self.cache,
                config=job.request.config,
                draft_exit=job.draft_exit,
                fitted=self.fitted,
                row=None if len(self._slots) == 1 else job.slot,
                work=self.work,
            )
            job.drafts.begin(job.request.prompt)
        else:
            self._decoder.seat(
                job.slot, len(job.request.prompt), rule=job.request.rule, missing_kv=job.way
            )
        exits = at_last_layer(logits, [job.slot], self.model.num_layers)
        self._choose(job, exits, 0, events)

    def _choose(self, job: Job, exits: Exits, n: int, events: list[Event]) -> None:
        """Choose the next token of a row, whose token is the ``n``-th of those that left."""
        row, layer = job.row, exits.exit_layers[n]
        try:
            token = row.sampler.choose(
                exits.logits[n],
                row.count,
                exit_layer=None if job.drafts else layer,
                likeliest=exits.likeliest[n] if exits.likeliest else None,
            )
        except GenerationError as error:
            self._fail(job, error, events)
        else:
            self._take(job, token, layer, exits.confidence[n], exits.logits[n], events)

    def _speculate(self, job: Job, drafts: SpeculativeDecoder, events: list[Event]) -> None:
        row, before = job.row, self.work.copy()
        try:
            last, left = row.completion.tokens[-1].id, row.limit - row.count
            chosen = drafts.speculative_decode(last, row.sampler, row.count, at_most=left)
        except GenerationError as error:
            self._fail(job, error, events)
            return
        job.request.drafted, job.request.accepted = drafts.drafted, drafts.accepted
        job.request.draft_work.add_since(before, self.work)
        for each in chosen:
            self._take(job, *each, events)
            if job.request.done:
                return

    def _take(
        self,
        job: Job,
        token: int,
        layer: int,
        confidence: float,
        logits: Tensor,
        events: list[Event],
    ) -> None:
        if self.auditor is not None and (job.drafts is not None or not job.row.count):
            self.auditor.record(False, None)  # a first token, or one that was verified
        taken = job.row.take(token, layer, confidence, logits)
        events.append(Event(request=job.request, token=taken))
        if job.row.finished():
            self._end(job, "finished")

    def _fail(self, job: Job, error: GenerationError, events: list[Event]) -> None:
        self._end(job, "failed", error.with_traceback(None))  # which would keep the logits
        events.append(Event(request=job.request, token=None))

    def _end(self, job: Job, state: State, error: GenerationError | None = None) -> None:
        """End a request and free its slot, or its place in the queue."""
        job.request.state, job.request.error = state, error
        del self._jobs[job.request.id]
        if job.slot < 0:
            self._queue.remove(job)
            return
        if job in self._joining:
            self._joining.remove(job)
        self._slots[job.slot] = None
        self._decoder.forget(job.slot)

    def _at(self, slot: int) -> Job:
        job = self._slots[slot]
        assert job is not None
        return job
