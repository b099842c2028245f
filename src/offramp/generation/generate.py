"""Generate text: prefill, then decode one token after another, or several at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.auditing import Auditor
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.engine import Engine
from offramp.generation.options import token_ids
from offramp.generation.promise import drafts_keep_the_text
from offramp.generation.requests import Request
from offramp.generation.rows import Completion, Token
from offramp.models.base import EarlyExitModel
from offramp.models.work import Work


class Generation(Iterator[Token]):
    """An iterator over new tokens as they are generated, with their cost so far.

    The iteration may stop before the text is complete. ``missing_kv`` says how the keys and values
    above an exit are computed; it is "exact" if all exits that may be used are complete, and None
    if no token can leave early. ``rule`` decides where tokens leave; None for full depth.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._tokens = _tokens(engine, request)
        self.completion, self.missing_kv = request.completion, request.missing_kv
        self.rule = request.rule

    def __next__(self) -> Token:
        return next(self._tokens)

    @property
    def text(self) -> str:
        """The whole new text; the remaining tokens are generated first."""
        for _ in self:
            pass
        return self.completion.text

    def __repr__(self) -> str:
        count, reason = len(self.completion.tokens), self.completion.finish_reason
        return f"Generation({count} tokens so far, {reason or 'not finished'})"

    @property
    def mean_layers(self) -> float:
        """Mean number of layers per new token so far; the first token counts with all layers."""
        run = self.work.layers_run + self._engine.model.num_layers
        return run / max(1, len(self.completion.tokens))

    @property
    def lossless(self) -> bool:
        """Whether the text is that of full depth, one token after another.

        It is not with a threshold, and not with drafts in a precision in which this model rounds
        several tokens differently from one: see docs/decoding.md.
        """
        if self._request.config.speculative:
            return drafts_keep_the_text(self._engine.model)
        return self.missing_kv is None

    @property
    def work(self) -> Work:
        """The work of the new tokens so far, without the prefill."""
        return self._engine.work

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafted tokens that were accepted; None if no token was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def drafted(self) -> int:
        """Number of drafted tokens."""
        return self._request.drafted

    @property
    def accepted(self) -> int:
        """Number of drafted tokens that the whole model accepted."""
        return self._request.accepted


def generate(
    model: EarlyExitModel,
    prompt: Sequence[int] | Int[Tensor, " T"],
    config: GenerateConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    policy: ThresholdPolicy | GainPolicy | None = None,
    fitted: FittedExits = NOTHING_FITTED,
    auditor: Auditor | None = None,
) -> Generation:
    """Generate one text, token by token, while the result is iterated.

    With ``config.speculative`` the text is that without drafts, if the model is in float32 or
    float64, or in bfloat16 in the native decoder with its compiled kernels; ``lossless`` of the
    result says whether this holds.

    ``tokenizer`` turns tokens into text. ``policy`` is used instead of a threshold. ``fitted``
    holds the gates and temperatures that the confidence reads, and the draft vocabulary.
    ``auditor`` runs a share of the tokens that leave early to the end, too; the text is the same.

    Raises ConfigError for an empty or too long prompt and for options that the model does not
    support, and, while iterating, GenerationError for logits that are not finite.
    """
    config = config or GenerateConfig()
    ids = token_ids(prompt)
    engine = _engine(model, [ids], config, tokenizer=tokenizer, fitted=fitted, auditor=auditor)
    return Generation(engine, engine.submit(ids, config, policy=policy))


def generate_batch(
    model: EarlyExitModel,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    policy: ThresholdPolicy | GainPolicy | None = None,
    fitted: FittedExits = NOTHING_FITTED,
    on_token: Callable[[int, Token], None] | None = None,
) -> tuple[list[Completion], Work]:
    """Generate a text for each prompt in one batch; each row leaves at its own exits.

    In float32 and float64, and in bfloat16 in the native decoder with its compiled kernels (up to
    16 rows), row i is the text that ``generate`` returns for its prompt with seed + i. Elsewhere it
    may differ, because several tokens are rounded differently from one. ``on_token`` is called with
    the row and each new token. Returns the completions and their work without the
    prefill. Raises the errors of ``generate``, and ConfigError for speculative decoding, which
    takes one prompt.
    """
    config = config or GenerateConfig()
    if config.speculative:
        raise ConfigError("speculative: expected one prompt at a time, got a batch")
    texts = [token_ids(prompt) for prompt in prompts]
    if not texts:
        raise ConfigError("prompts: expected at least 1, got none")
    engine = _engine(model, texts, config, tokenizer=tokenizer, fitted=fitted)
    requests = [
        engine.submit(text, replace(config, seed=config.seed + row), policy=policy)
        for row, text in enumerate(texts)
    ]
    rows = {request.id: row for row, request in enumerate(requests)}
    for event in engine.run():
        if event.token is None:
            assert event.request.error is not None
            raise event.request.error
        if on_token:
            on_token(rows[event.request.id], event.token)
    return [request.completion for request in requests], engine.work


def _engine(
    model: EarlyExitModel,
    prompts: list[list[int]],
    config: GenerateConfig,
    *,
    tokenizer: Tokenizer | None,
    fitted: FittedExits,
    auditor: Auditor | None = None,
) -> Engine:
    """Return an engine with a slot for each prompt, which runs all prompts first."""
    longest = max(map(len, prompts)) + config.max_new_tokens
    slots = EngineConfig(
        slots=len(prompts),
        capacity=min(longest, model.max_length),
        waiting=0,
        prefill_tokens=None,
    )
    return Engine(model, slots, tokenizer=tokenizer, fitted=fitted, auditor=auditor)


def _tokens(engine: Engine, request: Request) -> Iterator[Token]:
    for event in engine.run():
        if event.token is not None:
            yield event.token
    if request.error is not None:
        raise request.error
