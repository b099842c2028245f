"""Errors as OpenAI's API writes them: a status, and an object that says what is wrong."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from offramp.errors import GenerationError, OfframpError, QueueFullError
from offramp.serving.values import UnavailableError

TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
"""Kinds of errors by status; others are ``invalid_request_error``."""
FIELDS = {
    "max_new_tokens": "max_tokens",
    "stop_strings": "stop",
    "stop_tokens": "stop_token_ids",
    "thresholds": "threshold",
}
"""Fields of a config by their name in a request, where it differs."""


class HTTPError(Exception):
    """An answer other than 200: its status, its sentence, and its headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The error object. ``param`` is the field with which the sentence begins."""
        named = re.match(r"([a-z_]+)(\[\d+\]|\.\w+)*: ", self.message)
        about = {
            "message": self.message,
            "type": TYPES.get(self.status, "invalid_request_error"),
            "param": named[1] if named and self.status in (400, 404) else None,
            "code": self.code,
        }
        return {"error": about}

    def response(self) -> Response:
        """Return the error as a response."""
        return json_response(self.content, status=self.status, headers=self.headers)


def http_error(error: OfframpError, *, retry_after: int = 1) -> HTTPError:
    """Return the answer to a request that an error of offramp ends."""
    field, colon, rest = str(error).partition(":")
    said = f"{FIELDS.get(field, field)}{colon}{rest}"
    if isinstance(error, QueueFullError):
        headers = {"retry-after": str(retry_after)}
        return HTTPError(429, said, code="queue_full", headers=headers)
    if isinstance(error, UnavailableError):
        return HTTPError(503, said, code="unavailable", headers={"retry-after": "1"})
    if isinstance(error, GenerationError):
        return HTTPError(500, said, code="generation_failed")
    return HTTPError(400, said)


def json_response(
    content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a response of JSON."""
    body = msgspec.json.encode(content)
    return Response(body, status, dict(headers or {}), media_type="application/json")
