"""Generate text: prefill, then decode one token after another, or several at once."""

from collections.abc import Callable, Iterator, Sequence

from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.confident_exit import ExitDecoder, ExitRule
from offramp.generation.config import GenerateConfig
from offramp.generation.options import (
    check_prompt,
    check_tokens,
    draft_exit,
    exit_rule,
    missing_kv_for,
    token_ids,
)
from offramp.generation.promise import drafts_keep_the_text
from offramp.generation.rows import Completion, Row, Token
from offramp.generation.speculative import SpeculativeDecoder
from offramp.models.base import EarlyExitModel
from offramp.models.work import Work


class Generation(Iterator[Token]):
    """An iterator over new tokens as they are generated, with their cost so far.

    The iteration may stop before the text is complete. ``missing_kv`` says how the keys and values
    above an exit are computed; it is "exact" if all exits that may be used are complete, and None
    if no token can leave early. ``rule`` decides where tokens leave; None for full depth.
    """

    def __init__(
        self,
        tokens: Iterator[Token],
        *,
        completion: Completion,
        decoder: ExitDecoder | SpeculativeDecoder,
        missing_kv: str | None = None,
        rule: ExitRule | None = None,
    ) -> None:
        self._tokens, self._decoder = tokens, decoder
        self.completion, self.missing_kv, self.rule = completion, missing_kv, rule

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
        run = self.work.layers_run + self._decoder.model.num_layers
        return run / max(1, len(self.completion.tokens))

    @property
    def lossless(self) -> bool:
        """Whether the text is that of full depth, one token after another.

        It is not with a threshold, and not with drafts in a precision in which this model rounds
        several tokens differently from one: see docs/decoding.md.
        """
        decoder = self._decoder
        if isinstance(decoder, SpeculativeDecoder):
            return drafts_keep_the_text(decoder.model)
        return decoder.rule is None

    @property
    def work(self) -> Work:
        """The work of the new tokens so far, without the prefill."""
        return self._decoder.work

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafted tokens that were accepted; None if no token was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def drafted(self) -> int:
        """Number of drafted tokens."""
        return self._decoder.drafted

    @property
    def accepted(self) -> int:
        """Number of drafted tokens that the whole model accepted."""
        return self._decoder.accepted


def generate(
    model: EarlyExitModel,
    prompt: Sequence[int] | Int[Tensor, " T"],
    config: GenerateConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    policy: ThresholdPolicy | GainPolicy | None = None,
    fitted: FittedExits = NOTHING_FITTED,
) -> Generation:
    """Generate one text, token by token, while the result is iterated.

    With ``config.speculative`` the text is that without drafts, if the model is in float32 or
    float64, or in bfloat16 in the native decoder with its compiled kernels; ``lossless`` of the
    result says whether this holds.

    ``tokenizer`` turns tokens into text. ``policy`` is used instead of a threshold. ``fitted``
    holds the gates and temperatures that the confidence reads, and the draft vocabulary.

    Raises ConfigError for an empty or too long prompt and for options that the model does not
    support, and, while iterating, GenerationError for logits that are not finite.
    """
    config = config or GenerateConfig()
    prompt = token_ids(prompt)
    rule = exit_rule(model, config, policy=policy, fitted=fitted)
    _check(model, config, [prompt], tokenizer)
    row = Row(prompt, config, model=model, tokenizer=tokenizer, row=0)
    cache = model.make_cache(1, len(prompt) + row.limit)
    way, meaning = missing_kv_for(model, config, rule)
    if not config.speculative:
        decoder = ExitDecoder(model, cache, batch_size=1, rule=rule, missing_kv=way)
        tokens = (token for _, token in _decode(decoder, [prompt], [row]))
        return Generation(
            tokens, completion=row.completion, decoder=decoder, missing_kv=meaning, rule=rule
        )
    drafting = SpeculativeDecoder(
        model,
        cache,
        config=config,
        draft_exit=draft_exit(model, config, fitted),
        fitted=fitted,
    )
    return Generation(
        _decode_speculatively(drafting, prompt, row), completion=row.completion, decoder=drafting
    )


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

    In float32 and float64, row i is the text that ``generate`` returns for its prompt with
    seed + i. In bfloat16 and float16 it may differ, because the prompts of a batch are rounded
    differently from one alone. ``on_token`` is
    called with the row and each new token. Returns the completions and their work without the
    prefill. Raises the errors of ``generate``, and ConfigError for speculative decoding, which
    takes one prompt.
    """
    config = config or GenerateConfig()
    if config.speculative:
        raise ConfigError("speculative: expected one prompt at a time, got a batch")
    texts = [token_ids(prompt) for prompt in prompts]
    rule = exit_rule(model, config, policy=policy, fitted=fitted)
    _check(model, config, texts, tokenizer)
    rows = [
        Row(prompt, config, model=model, tokenizer=tokenizer, row=i)
        for i, prompt in enumerate(texts)
    ]
    capacity = max(len(prompt) + row.limit for prompt, row in zip(texts, rows, strict=True))
    decoder = ExitDecoder(
        model,
        model.make_cache(len(texts), capacity),
        batch_size=len(texts),
        rule=rule,
        missing_kv=missing_kv_for(model, config, rule)[0],
    )
    for place, token in _decode(decoder, texts, rows):
        if on_token:
            on_token(place, token)
    return [row.completion for row in rows], decoder.work


def _check(
    model: EarlyExitModel,
    config: GenerateConfig,
    prompts: list[list[int]],
    tokenizer: Tokenizer | None,
) -> None:
    if not prompts:
        raise ConfigError("prompts: expected at least 1, got none")
    for prompt in prompts:
        check_prompt(prompt, model)
        check_tokens("prompt", prompt, model.vocab_size)
    check_tokens("stop_tokens", config.stop_tokens, model.vocab_size)
    if config.stop_strings and tokenizer is None:
        raise ConfigError("stop_strings: expected a tokenizer too, got none")


def _decode(
    decoder: ExitDecoder, prompts: list[list[int]], rows: list[Row]
) -> Iterator[tuple[int, Token]]:
    exits, going = decoder.prefill(prompts), list(range(len(rows)))
    while True:
        chosen = [
            rows[place].sampler.choose(
                exits.logits[i],
                rows[place].count,
                exit_layer=exits.exit_layers[i],
                likeliest=exits.likeliest[i] if exits.likeliest else None,
            )
            for i, place in enumerate(going)
        ]
        for i, place in enumerate(going):
            yield place, rows[place].take(chosen[i], exits.exit_layers[i], exits.confidence[i])
        on = [i for i, place in enumerate(going) if not rows[place].finished()]
        if not on:
            return
        going = [going[i] for i in on]
        exits = decoder.decode_one_token([chosen[i] for i in on], going)


def _decode_speculatively(
    decoder: SpeculativeDecoder, prompt: list[int], row: Row
) -> Iterator[Token]:
    [chosen] = decoder.prefill(prompt, row.sampler)
    yield row.take(*chosen)
    while not row.finished():
        last = row.completion.tokens[-1].id
        for chosen in decoder.speculative_decode(
            last, row.sampler, row.count, at_most=row.limit - row.count
        ):
            yield row.take(*chosen)
            if row.finished():
                return
