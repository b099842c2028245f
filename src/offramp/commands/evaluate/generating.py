"""Generate the texts of a task: its options as requests to the engine, and what they cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from tokenizers import Tokenizer

from offramp.commands.evaluate.counts import TaskCounts
from offramp.commands.evaluate.scoring import Scoring
from offramp.commands.evaluate.tokens import special_token
from offramp.data.tokenizer_errors import decode
from offramp.errors import ConfigError
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.engine import Engine
from offramp.generation.requests import Request
from offramp.models.open import OpenedModel
from offramp.schema import shown

MAX_NEW = 256
"""New tokens of a task that says nothing about them, as in the harness's own models."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = (*_LENGTHS, "until", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """How one text is generated, and where it is cut."""

    config: GenerateConfig
    until: tuple[str, ...]
    "Strings at whose first occurrence the text is cut."


def text_request(
    opened: OpenedModel, options: Mapping[str, Any], config: GenerateConfig, *, seed: int
) -> TextRequest:
    """Return the request for a task's ``generation_kwargs``.

    ``config`` says where tokens leave. The text is greedy unless ``do_sample`` is true or, without
    ``do_sample``, ``temperature`` is above 0. Raises ConfigError for an option that decoding here
    does not have.
    """
    for name, value in options.items():
        if name not in _KNOWN and not (name == "num_beams" and value == 1):
            raise ConfigError(
                f"generation_kwargs: expected {', '.join(_KNOWN)}, got {shown(str(name))}"
            )
    until = _until(options.get("until"))
    temperature = _number(options, "temperature", 0.0)
    sample = options.get("do_sample")
    if sample is False or (sample is None and temperature == 0):
        temperature = 0.0
    elif temperature == 0:
        temperature = 1.0
    lengths = [options[name] for name in _LENGTHS if options.get(name) is not None]
    whole = _special_texts(opened.tokenizer, until)
    end = special_token(opened, "eos")
    ends = (*opened.end_tokens, *whole.values(), *(() if end is None else (end,)))
    chosen: dict[str, Any] = {}
    if temperature and options.get("top_k"):
        chosen["top_k"] = int(_number(options, "top_k", 0))
    if temperature and options.get("top_p") is not None:
        chosen["top_p"] = _number(options, "top_p", 1.0)
    if options.get("repetition_penalty") is not None:
        chosen["repetition_penalty"] = _number(options, "repetition_penalty", 1.0)
    made = replace(
        config,
        max_new_tokens=int(_number({"max_gen_toks": lengths[0]}, "max_gen_toks", 0))
        if lengths
        else MAX_NEW,
        temperature=temperature,
        stop_strings=until,
        stop_tokens=tuple(dict.fromkeys(ends)),
        seed=seed,
        **chosen,
    )
    spelled = () if end is None else (opened.tokenizer.decode([end], skip_special_tokens=False),)
    return TextRequest(config=made, until=(*until, *filter(None, spelled)))


def _until(written: Any) -> tuple[str, ...]:
    strings = [written] if isinstance(written, str) else [] if written is None else written
    if not (isinstance(strings, list | tuple) and all(isinstance(each, str) for each in strings)):
        raise ConfigError(f"until: expected a string or a list of strings, got {shown(written)}")
    return tuple(dict.fromkeys(filter(None, strings)))


def _number(options: Mapping[str, Any], name: str, default: float) -> float:
    value = options.get(name, default)
    value = default if value is None else value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}: expected a number, got {shown(value)}") from None


def _special_texts(tokenizer: Tokenizer, until: tuple[str, ...]) -> dict[str, int]:
    """Return the strings that are special tokens, which a text does not show, with their ids."""
    special = {
        token.content: id
        for id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    return {text: special[text] for text in until if text in special}


def generate_texts(
    scoring: Scoring,
    prompts: Sequence[list[int]],
    wanted: Sequence[TextRequest],
    *,
    counts: TaskCounts,
    on_done: Callable[[int], None],
) -> list[str]:
    """Generate a text for each prompt, many at a time, and add what they cost to ``counts``.

    ``on_done`` is called with the number of texts that are complete.
    """
    opened = scoring.opened
    pairs = list(zip(prompts, wanted, strict=True))
    engine = Engine(
        scoring.model,
        EngineConfig(
            slots=min(scoring.batch_size, len(prompts)),
            capacity=max(len(ids) + each.config.max_new_tokens for ids, each in pairs),
            waiting=len(prompts),
            prefill_tokens=None,
        ),
        tokenizer=opened.tokenizer,
        fitted=opened.fitted,
    )
    began, done = perf_counter(), 0
    on_done(done)
    requests = [engine.submit(ids, each.config) for ids, each in pairs]
    for event in engine.run():
        if event.token is None:
            assert event.request.error is not None
            raise event.request.error
        if event.request.done:
            done += 1
            on_done(done)
    counts.seconds += perf_counter() - began
    for request in requests:
        exits = [token.exit_layer for token in request.completion.tokens]
        counts.add(exits, len(request.prompt), scoring.model)
    return [
        _text(opened.tokenizer, request, each.until)
        for request, each in zip(requests, wanted, strict=True)
    ]


def _text(tokenizer: Tokenizer, request: Request, until: Sequence[str]) -> str:
    """Return a finished text without special tokens, up to the first string of ``until``."""
    ids = request.completion.ids
    if request.completion.finish_reason == "stop_token":
        ids = ids[:-1]
    text = decode(tokenizer, ids)
    ends = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
