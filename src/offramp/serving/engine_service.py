"""An opened model as a ``Service``: texts become tokens, go through the engine, and come back."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

from offramp.calibration.thresholds import StoredThresholds
from offramp.commands.audit import AuditLog
from offramp.commands.chat_template import chat_tokenizer, message_ids
from offramp.commands.generate import prompt_ids, with_end_tokens
from offramp.data.tokenizer_errors import decode
from offramp.errors import CheckpointError, ConfigError, QueueFullError
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.engine import Engine
from offramp.generation.requests import Request
from offramp.generation.rows import Token
from offramp.models.open import OpenedModel
from offramp.options import config_of
from offramp.serving.caps import cap_of, capped
from offramp.serving.config import ServeConfig
from offramp.serving.costs import Costs
from offramp.serving.info import model_info
from offramp.serving.values import Ask, Ending, Load, Message, ModelInfo, NewToken, Piece, Started
from offramp.serving.worker import Mailbox, Worker, stopped

DEFAULT_NEW_TOKENS = GenerateConfig().max_new_tokens
_STOPPED = Load(running=0, waiting=0, healthy=False)


class EngineService:
    """Answers with an engine in this process, which a thread steps.

    ``stored`` are the thresholds of a certificate, which then cap those of requests. ``audit``
    records what the audit of all requests finds. The engine's cache is made at once.

    Raises UnsupportedArchitectureError for a model whose blocks cannot be run one by one.
    """

    def __init__(
        self,
        opened: OpenedModel,
        config: ServeConfig,
        *,
        stored: StoredThresholds | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        self._opened, self._config, self._stored = opened, config, stored
        self.engine = Engine(
            opened.model,
            EngineConfig(
                slots=config.slots,
                capacity=config.capacity,
                waiting=config.waiting,
                prefill_tokens=config.prefill_tokens,
            ),
            tokenizer=opened.tokenizer,
            fitted=opened.fitted,
            auditor=None if audit is None else audit.auditor(),
        )
        self._costs = Costs(opened)
        self._chat = _chat_tokenizer(opened)
        self._word = lru_cache(maxsize=1 << 16)(lambda id: decode(opened.tokenizer, [id]))
        self._about = model_info(
            opened,
            config,
            costs=self._costs,
            capacity=self.engine.capacity,
            chat=self._chat is not None,
            cap=None if stored is None else cap_of(stored),
        )
        self._open = 0
        self._worker: Worker | None = None

    @property
    def about(self) -> ModelInfo:
        """The model, as the API describes it."""
        return self._about

    async def start(self) -> None:
        """Start the engine's thread."""
        self._worker = Worker(self.engine)

    async def close(self) -> None:
        """Stop the engine's thread; what still runs fails with UnavailableError."""
        if self._worker is not None:
            await self._worker.stop()

    def load(self) -> Load:
        """Return how many requests run and wait."""
        return _STOPPED if self._worker is None else self._worker.load

    async def answer(self, ask: Ask) -> AsyncGenerator[Started | Piece, None]:
        """Generate a text; see ``Service.answer``."""
        if self._worker is None or not self._worker.load.healthy:
            raise stopped()
        if self._open >= self._config.slots + self._config.waiting:
            raise QueueFullError(
                f"queue: expected at most {self._config.waiting} waiting requests, got one more; "
                "try again when one is done"
            )
        self._open += 1
        box = None
        try:
            prompt, config = await asyncio.to_thread(self._prepared, ask)
            box = self._worker.submit(prompt, config, ask.logprobs)
            while box.request is None and not box.ended:
                await box.changed()
            if box.request is None and box.error is not None:
                raise box.error
            yield Started(prompt_tokens=len(prompt))
            while True:
                if not (box.tokens or box.ended):
                    await box.changed()
                    continue
                taken, box.tokens = box.tokens, []
                if box.error is not None and not taken:
                    raise box.error
                tokens = tuple(map(self._token, taken))
                if box.error is None and box.ended:
                    yield Piece(tokens=tokens, end=self._ending(box))
                    return
                yield Piece(tokens=tokens)
        finally:
            self._open -= 1
            if box is not None and not box.ended:
                self._worker.cancel(box)

    def _prepared(self, ask: Ask) -> tuple[list[int], GenerateConfig]:
        """Return the token ids and the config of a request. Raises OfframpError."""
        ids = self._ids(ask)
        if len(ids) > self._about.capacity:
            raise ConfigError(
                f"prompt: expected at most {self._about.capacity} tokens, got {len(ids)}"
            )
        room = self._about.capacity - len(ids) + 1  # the last token needs no place in the cache
        most = min(self._about.max_tokens, room)
        options = {"max_new_tokens": min(DEFAULT_NEW_TOKENS, most), **ask.options}
        if options["max_new_tokens"] > most:
            why = f" with a prompt of {len(ids)} tokens" if most == room else ""
            raise ConfigError(
                f"max_tokens: expected at most {most}{why}, got {options['max_new_tokens']}"
            )
        config = config_of(GenerateConfig, options)
        if self._stored is not None:
            named = options.get("missing_kv")
            config = capped(config, self._stored, self._opened, missing_kv=named)
        return ids, with_end_tokens(self._opened, config)

    def _ids(self, ask: Ask) -> list[int]:
        if isinstance(ask.prompt, str):
            return prompt_ids(self._opened, ask.prompt)
        messages = [each for each in ask.prompt if isinstance(each, Message)]
        if not messages:
            return [each for each in ask.prompt if isinstance(each, int)]
        if self._chat is None:
            raise ConfigError(
                f"messages: expected a model with a chat template, and {self._about.id} has none"
            )
        return message_ids(self._opened, self._chat, [asdict(each) for each in messages])

    def _token(self, token: Token) -> NewToken:
        new = NewToken(
            id=token.id, text=token.text, exit_layer=token.exit_layer, confidence=token.confidence
        )
        if token.logprob is None:
            return new
        top = tuple((self._word(id), logprob) for id, logprob in token.top_logprobs)
        return replace(new, word=self._word(token.id), logprob=token.logprob, top_logprobs=top)

    def _ending(self, box: Mailbox) -> Ending:
        request = box.request
        assert request is not None
        count = len(request.completion.tokens)
        seconds = box.last - box.first
        return Ending(
            finish_reason="length" if request.completion.finish_reason == "length" else "stop",
            mean_layers=self._costs.mean_layers(request),
            flops_pct=self._costs.flops_pct(request),
            missing_kv=request.missing_kv,
            confidence=None if request.rule is None else request.rule.confidence,
            acceptance_rate=_acceptance(request),
            tokens_per_s=(count - 1) / seconds if count > 1 and seconds > 0 else None,
            seconds_to_first_token=box.first - box.submitted,
        )


def _acceptance(request: Request) -> float | None:
    return request.accepted / request.drafted if request.drafted else None


def _chat_tokenizer(opened: OpenedModel) -> Any:
    """Return the tokenizer with the model's chat template; None if there is none."""
    try:
        return chat_tokenizer(opened)
    except (ConfigError, CheckpointError):
        return None
