"""The JSON bodies of requests: read, checked, and turned into texts to generate."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_args

import msgspec

from offramp.errors import ConfigError
from offramp.schema import fitting, shown
from offramp.serving.values import Ask, Message, Role

Body = TypeVar("Body", bound="CommonBody")
ROLES = get_args(Role)
MOST_STOPS = 16
MOST_LOGPROBS = 20
EVERY_TOKEN = (0, -1)
"""Values of ``top_k`` that mean all tokens, as in vLLM."""
OF_DRAFTS = ("draft_exit", "draft_threshold", "max_drafts")
"""Fields that need ``speculative``."""
IGNORED = (
    *("user", "store", "metadata", "service_tier", "parallel_tool_calls", "prompt_cache_key"),
    *("prompt_cache_options", "prompt_cache_retention", "safety_identifier", "prediction"),
)
"""Fields of OpenAI's API that change no token of the answer."""
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}
"""Fields of OpenAI's API that would change the answer, and the values that do not."""
SAME = (
    *("seed", "temperature", "top_p", "repetition_penalty", "decay", "confidence", "missing_kv"),
    *OF_DRAFTS,
)
"""Fields of a request that are fields of ``GenerateConfig`` as they are."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """What a stream has beside its tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False
    "Accepted, and without effect."


@dataclass(frozen=True, kw_only=True)
class CommonBody:
    """The fields that both kinds of completion have."""

    model: str | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    threshold: float | list[float] | None = None
    decay: float | None = None
    confidence: str | None = None
    missing_kv: Literal["propagate", "recompute", "exact"] | None = None
    speculative: bool = False
    draft_exit: int | None = None
    draft_threshold: float | None = None
    max_drafts: int | None = None

    def __post_init__(self) -> None:
        for name in OF_DRAFTS:
            if getattr(self, name) is not None and not self.speculative:
                raise ConfigError(f"{name}: expected speculative with it, got {name} alone")
        if isinstance(self.stop, list) and len(self.stop) > MOST_STOPS:
            raise ConfigError(f"stop: expected at most {MOST_STOPS} strings, got {len(self.stop)}")

    def options(self) -> dict[str, Any]:
        """Return the fields of ``GenerateConfig`` that the request names."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        threshold = tuple(self.threshold) if isinstance(self.threshold, list) else self.threshold
        found = {
            "max_new_tokens": self.max_tokens,
            "stop_strings": None if stops is None else tuple(stops),
            "stop_tokens": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "top_k": None if self.top_k in EVERY_TOKEN else self.top_k,
            "threshold": threshold,
            "speculative": self.speculative or None,
        }
        found |= {name: getattr(self, name) for name in SAME}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class CompletionBody(CommonBody):
    """The body of /v1/completions."""

    prompt: str | list[Any]
    logprobs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_logprobs("logprobs", self.logprobs)

    def asks(self) -> list[Ask]:
        """Return the texts to generate, one for each prompt."""
        return [
            Ask(prompt=prompt, options=self.options(), logprobs=self.logprobs)
            for prompt in _prompts(self.prompt)
        ]


@dataclass(frozen=True, kw_only=True)
class ChatBody(CommonBody):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_logprobs("top_logprobs", self.top_logprobs)
        if self.top_logprobs is not None and not self.logprobs:
            raise ConfigError("top_logprobs: expected logprobs true with it")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ConfigError(f"max_tokens: expected {both[1]} as the other, got {both[0]}")

    def options(self) -> dict[str, Any]:
        """Return the fields of ``GenerateConfig`` that the request names."""
        found = super().options()
        if self.max_completion_tokens is not None:
            found["max_new_tokens"] = self.max_completion_tokens
        return found

    def asks(self) -> list[Ask]:
        """Return the one text to generate."""
        if not self.messages:
            raise ConfigError("messages: expected at least 1, got none")
        messages = tuple(_message(n, each) for n, each in enumerate(self.messages))
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return [Ask(prompt=messages, options=self.options(), logprobs=logprobs)]


def body_of(type_: type[Body], data: bytes) -> Body:
    """Return what a request's body says. Raises ConfigError for anything that does not fit.

    What is null counts as not given.
    """
    try:
        content = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"body: expected JSON in UTF-8, got: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"body: expected a JSON object, got {shown(content)}")
    given = {
        name: _whole(value)
        for name, value in content.items()
        if value is not None and name not in IGNORED
    }
    for name, harmless in UNSUPPORTED.items():
        if name in given and not _is_one_of(value := given.pop(name), harmless):
            expected = f"nothing but {shown(harmless[0])}" if harmless else "no such field"
            raise ConfigError(f"{name}: expected {expected}, got {shown(value)}")
    names = [field.name for field in fields(type_)]
    for name in given:
        if name not in names:
            near = get_close_matches(name[:100], names, n=1)
            hint = f"; perhaps {near[0]}" if near else ""
            raise ConfigError(f"{shown(name)}: expected no such field{hint}")
    return fitting(type_, given)


def _whole(value: Any) -> Any:
    """Return whole numbers for those that JSON writes as 9.0, also in a list."""
    if isinstance(value, list):
        return [_whole(each) if isinstance(each, float) else each for each in value]
    small = isinstance(value, float) and abs(value) < 1 << 53
    return int(value) if small and value.is_integer() else value


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Return whether a value of JSON is one of these; false is not 0."""
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in values
    )


def _prompts(prompt: str | list[Any]) -> list[str | tuple[int, ...]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(isinstance(each, str) for each in prompt):
        return list(prompt)
    if _are_ids(prompt):
        return [tuple(map(int, prompt))]
    if prompt and all(isinstance(each, list) and _are_ids(each) for each in prompt):
        return [tuple(map(int, each)) for each in prompt]
    raise ConfigError(
        "prompt: expected a string, a list of strings, a list of token ids or a list of such "
        f"lists, got {shown(prompt)}"
    )


def _are_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(_whole(each)) is int for each in value)


def _message(place: int, content: Mapping[str, Any]) -> Message:
    """Return a message; its content may be a string, or a list of parts of type text."""
    where = f"messages[{place}]"
    given = {name: value for name, value in content.items() if value is not None}
    for name in given:
        if name not in ("role", "content", "name"):
            raise ConfigError(f"{where}.{shown(name)[:60]}: expected no such field")
    if not isinstance(given.get("name", ""), str):
        raise ConfigError(f"{where}.name: expected a string, got {shown(given['name'])}")
    text = given.get("content")
    if isinstance(text, list):
        text = "".join(_part(f"{where}.content[{n}]", part) for n, part in enumerate(text))
    if not isinstance(text, str):
        raise ConfigError(f"{where}.content: expected a string, got {shown(text)}")
    role: Any = given.get("role")
    if role not in ROLES:
        raise ConfigError(f"{where}.role: expected {' or '.join(ROLES)}, got {shown(role)}")
    return Message(role=role, content=text)


def _part(where: str, part: Any) -> str:
    if not (isinstance(part, dict) and part.get("type") == "text"):
        raise ConfigError(f"{where}: expected a part of type text, got {shown(part)}")
    if unknown := [name for name in part if name not in ("type", "text")]:
        raise ConfigError(f"{where}.{shown(unknown[0])}: expected no such field")
    if not isinstance(part.get("text"), str):
        raise ConfigError(f"{where}.text: expected a string, got {shown(part.get('text'))}")
    return str(part["text"])


def _check_logprobs(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MOST_LOGPROBS:
        raise ConfigError(f"{name}: expected from 0 to {MOST_LOGPROBS}, got {shown(value)}")
