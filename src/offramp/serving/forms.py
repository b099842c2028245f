"""Answers as OpenAI's API writes them: whole, and as the chunks of a stream."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from offramp.serving.values import Ending, NewToken

LEAST_LOGPROB = -9999.0
"""What stands for the logarithm of a probability of 0, as in OpenAI's API."""


@dataclass(kw_only=True)
class Text:
    """A whole text: its tokens and its end."""

    prompt_tokens: int
    tokens: list[NewToken] = field(default_factory=list)
    end: Ending | None = None

    @property
    def text(self) -> str:
        """The text itself."""
        return "".join(token.text for token in self.tokens)


class Form(Protocol):
    """The shape of the answers to one kind of request."""

    def beginning(self, index: int) -> list[dict[str, Any]]:
        """Return the chunks with which the text of a prompt begins."""

    def chunk(self, index: int, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Return the chunk with some new tokens."""

    def last(self, index: int, end: Ending) -> dict[str, Any]:
        """Return the chunk with which a text ends."""

    def usage(self, texts: Sequence[Text]) -> dict[str, Any]:
        """Return the chunk with the numbers of tokens."""

    def whole(self, texts: Sequence[Text]) -> dict[str, Any]:
        """Return the answer to a request without a stream."""


class CompletionForm:
    """The form of /v1/completions. ``logprobs``: whether tokens have them."""

    def __init__(self, model: str, *, logprobs: bool, prompts: int) -> None:
        self._head = _head("cmpl", "text_completion", model)
        self._logprobs = logprobs
        self._offsets = [0] * prompts

    def beginning(self, index: int) -> list[dict[str, Any]]:
        """Nothing comes before the first token."""
        return []

    def chunk(self, index: int, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Return the chunk with some new tokens."""
        return self._head | {
            "choices": [self._choice(index, tokens, None)],
            "offramp": {"tokens": tokens_json(tokens)},
        }

    def last(self, index: int, end: Ending) -> dict[str, Any]:
        """Return the chunk with which a text ends."""
        return self._head | {
            "choices": [self._choice(index, (), end)],
            "offramp": figures_json((), end),
        }

    def usage(self, texts: Sequence[Text]) -> dict[str, Any]:
        """Return the chunk with the numbers of tokens."""
        return self._head | {"choices": [], "usage": usage_json(texts)}

    def whole(self, texts: Sequence[Text]) -> dict[str, Any]:
        """Return the answer to a request without a stream."""
        choices = [self._choice(n, each.tokens, each.end) for n, each in enumerate(texts)]
        return self._head | _with_figures(choices, texts) | {"usage": usage_json(texts)}

    def _choice(self, index: int, tokens: Sequence[NewToken], end: Ending | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(token.text for token in tokens),
            "logprobs": self._logprobs_json(index, tokens) if self._logprobs else None,
            "finish_reason": end.finish_reason if end else None,
        }

    def _logprobs_json(self, index: int, tokens: Sequence[NewToken]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return {
            "tokens": [token.word for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [_by_word(token.top_logprobs) for token in tokens],
            "text_offset": offsets,
        }


class ChatForm:
    """The form of /v1/chat/completions. ``logprobs``: whether tokens have them."""

    def __init__(self, model: str, *, logprobs: bool) -> None:
        self._head = _head("chatcmpl", "chat.completion", model)
        self._chunk_head = self._head | {"object": "chat.completion.chunk"}
        self._logprobs = logprobs

    def beginning(self, index: int) -> list[dict[str, Any]]:
        """Return the chunk that names the role."""
        return [self._delta(index, {"role": "assistant", "content": ""}, (), None)]

    def chunk(self, index: int, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Return the chunk with some new tokens."""
        text = "".join(token.text for token in tokens)
        return self._delta(index, {"content": text}, tokens, None)

    def last(self, index: int, end: Ending) -> dict[str, Any]:
        """Return the chunk with which the text ends."""
        return self._delta(index, {}, (), end)

    def usage(self, texts: Sequence[Text]) -> dict[str, Any]:
        """Return the chunk with the numbers of tokens."""
        return self._chunk_head | {"choices": [], "usage": usage_json(texts)}

    def whole(self, texts: Sequence[Text]) -> dict[str, Any]:
        """Return the answer to a request without a stream."""
        choices = [
            {
                "index": n,
                "message": {"role": "assistant", "content": each.text, "refusal": None},
                "logprobs": self._logprobs_json(each.tokens),
                "finish_reason": each.end.finish_reason if each.end else None,
            }
            for n, each in enumerate(texts)
        ]
        return self._head | _with_figures(choices, texts) | {"usage": usage_json(texts)}

    def _delta(
        self,
        index: int,
        delta: Mapping[str, str],
        tokens: Sequence[NewToken],
        end: Ending | None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs_json(tokens) if tokens else None,
            "finish_reason": end.finish_reason if end else None,
        }
        figures = figures_json(tokens, end) if end else {"tokens": tokens_json(tokens)}
        return self._chunk_head | {"choices": [choice], "offramp": figures}

    def _logprobs_json(self, tokens: Sequence[NewToken]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            _one_word(token.word, token.logprob)
            | {"top_logprobs": [_one_word(*each) for each in token.top_logprobs]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def tokens_json(tokens: Sequence[NewToken]) -> list[dict[str, Any]]:
    """Return tokens with their exit layers."""
    return [
        {
            "id": token.id,
            "text": token.text,
            "exit_layer": token.exit_layer,
            "confidence": token.confidence,
        }
        for token in tokens
    ]


def figures_json(tokens: Sequence[NewToken], end: Ending | None) -> dict[str, Any]:
    """Return tokens with the figures of their text."""
    figures = asdict(end) if end else {}
    figures.pop("finish_reason", None)
    return {"tokens": tokens_json(tokens), **figures}


def usage_json(texts: Sequence[Text]) -> dict[str, int]:
    """Return the numbers of tokens of a request."""
    prompt = sum(each.prompt_tokens for each in texts)
    new = sum(len(each.tokens) for each in texts)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _with_figures(choices: list[dict[str, Any]], texts: Sequence[Text]) -> dict[str, Any]:
    """Return the choices with the figures of one text beside them, or in each of several."""
    if len(texts) == 1:
        return {"choices": choices, "offramp": figures_json(texts[0].tokens, texts[0].end)}
    for choice, each in zip(choices, texts, strict=True):
        choice["offramp"] = figures_json(each.tokens, each.end)
    return {"choices": choices}


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def _by_word(top: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return log probabilities by token; of tokens with the same text the likelier counts."""
    found: dict[str, float] = {}
    for word, logprob in top:
        found.setdefault(word, _finite(logprob))
    return found


def _one_word(word: str, logprob: float | None) -> dict[str, Any]:
    return {"token": word, "logprob": _finite(logprob), "bytes": list(word.encode())}


def _finite(logprob: float | None) -> float:
    return max(LEAST_LOGPROB, LEAST_LOGPROB if logprob is None else logprob)
