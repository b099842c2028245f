"""The OpenAPI document of the server: what requests may hold, and what answers hold."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from offramp.serving.bodies import IGNORED, MOST_LOGPROBS, MOST_STOPS, ROLES
from offramp.serving.config import ServeConfig
from offramp.serving.values import ModelInfo, Service
from offramp.version import __version__

Schema = dict[str, Any]
LARGEST = (1 << 63) - 1
ERRORS = {
    400: "The request does not fit; the message says why.",
    401: "The key is missing or another one.",
    403: "The server has no key and is called by a name that is not its own.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "As many requests wait as may; try again after Retry-After seconds.",
    500: "The model failed.",
    503: "The server stops.",
    504: "The request took too long.",
}


def describe(app: FastAPI, service: Service, config: ServeConfig) -> None:
    """Let an app answer /openapi.json by the document of its service."""
    app.openapi = lambda: document(service.about, config)  # type: ignore[method-assign]


def document(about: ModelInfo, config: ServeConfig) -> Schema:
    """Return the OpenAPI document for a model."""
    text, chat = {"$ref": "#/components/schemas/Text"}, {"$ref": "#/components/schemas/Chat"}
    paths = {
        "/v1/completions": {
            "post": _generate("Continue texts.", completion_schema(about), text, config)
        },
        "/v1/chat/completions": {
            "post": _generate("Continue a conversation.", chat_schema(about), chat, config)
        },
        "/v1/models": {"get": _get("List the model.", _json({"type": "object"}), config)},
        "/v1/models/{model}": {
            "get": {
                **_get("Describe the model.", _json({"type": "object"}), config, 404),
                "parameters": [
                    {
                        "name": "model",
                        "in": "path",
                        "required": True,
                        "schema": {"type": "string", "enum": [about.id]},
                    }
                ],
            }
        },
        "/healthz": {
            "get": {
                "summary": "Say whether the server takes requests.",
                "responses": {
                    "200": _answer("It does.", _json({"type": "object"})),
                    "403": _error(403),
                    "503": _answer("It stops, or its engine failed.", _json({"type": "object"})),
                },
            }
        },
        "/metrics": {"get": _get("Metrics for Prometheus.", {"text/plain": {}}, config)},
    }
    if not about.chat:
        del paths["/v1/chat/completions"]
    components: Schema = {
        "schemas": {"Error": ERROR, "Text": _text("text_completion"), "Chat": _text("chat")}
    }
    if config.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "offramp", "version": __version__},
        "paths": paths,
        "components": components,
    }


def completion_schema(about: ModelInfo) -> Schema:
    """Return the schema of the body of /v1/completions."""
    ids = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": about.vocab_size - 1},
        "minItems": 1,
        "maxItems": about.capacity,
    }
    text = {"type": "string", "minLength": 1, "maxLength": about.capacity}
    prompts = {"minItems": 1, "maxItems": about.most_prompts}
    properties = _common(about) | {
        "prompt": {
            "anyOf": [
                text,
                ids,
                {"type": "array", "items": text, **prompts},
                {"type": "array", "items": ids, **prompts},
            ]
        },
        "logprobs": _maybe({"type": "integer", "minimum": 0, "maximum": MOST_LOGPROBS}),
        "best_of": _only(1),
        "echo": _only(False),
        "suffix": _only(""),
    }
    return _body(properties, ["prompt"])


def chat_schema(about: ModelInfo) -> Schema:
    """Return the schema of the body of /v1/chat/completions."""
    part = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
    message = {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]},
            "name": {},
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    }
    properties = _common(about) | {
        "messages": {"type": "array", "items": message, "minItems": 1},
        "max_completion_tokens": _tokens(about),
        "logprobs": _maybe({"type": "boolean"}),
        "top_logprobs": _maybe({"type": "integer", "minimum": 0, "maximum": MOST_LOGPROBS}),
        "tools": _only([]),
        "functions": _only([]),
        "response_format": _only({"type": "text"}),
        "modalities": _only(["text"]),
    }
    return _body(properties, ["messages"])


def _body(properties: Schema, required: list[str]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        "not": {  # speculative decoding verifies at full depth
            "properties": {"speculative": {"const": True}, "threshold": {"not": {"type": "null"}}},
            "required": ["speculative", "threshold"],
        },
    }


def _common(about: ModelInfo) -> Schema:
    stop = {"type": "string", "minLength": 1}
    number: Schema = {"type": "number"}
    early = about.exit_layers[:-1]
    cap = about.certificate
    limits: Schema = {}
    if cap is not None and max(cap.thresholds) < float("inf"):
        limits = {"minimum": max(cap.thresholds)}
    threshold: Schema = {"type": "null"}
    if early:
        threshold = _maybe(
            number | limits,
            {
                "type": "array",
                "items": number | limits,
                "minItems": len(early),
                "maxItems": len(early),
            },
        )
    return {
        "model": _maybe({"type": "string", "enum": [about.id]}),
        "max_tokens": _tokens(about),
        "stop": _maybe(stop, {"type": "array", "items": stop, "maxItems": MOST_STOPS}),
        "seed": _maybe({"type": "integer", "minimum": 0, "maximum": LARGEST}),
        "temperature": _maybe(number | {"minimum": 0}),
        "top_p": _maybe(number | {"exclusiveMinimum": 0, "maximum": 1}),
        "stream": _maybe({"type": "boolean"}),
        "stream_options": _maybe(
            {
                "type": "object",
                "properties": {
                    "include_usage": {"type": "boolean"},
                    "include_obfuscation": {"type": "boolean"},
                },
                "additionalProperties": False,
            }
        ),
        "threshold": threshold,
        "confidence": _maybe({"enum": list(about.confidences)}) if early else {"type": "null"},
        "missing_kv": _maybe(
            {"enum": ["propagate", "recompute"] if cap is None else [cap.missing_kv]}
        ),
        "speculative": _maybe({"type": "boolean"} if early else {"const": False}),
        "n": _only(1),
        "frequency_penalty": _only(0),
        "presence_penalty": _only(0),
        "logit_bias": _only({}),
        **{name: {} for name in IGNORED},
    }


def _tokens(about: ModelInfo) -> Schema:
    return _maybe({"type": "integer", "minimum": 1, "maximum": about.max_tokens})


def _maybe(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas, {"type": "null"}]}


def _only(value: Any) -> Schema:
    return _maybe({"const": value})


ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def _text(kind: str) -> Schema:
    return {
        "type": "object",
        "description": f"An answer without a stream ({kind}).",
        "properties": {
            "id": {"type": "string"},
            "object": {"type": "string"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": {"type": "object"}},
            "usage": {"type": "object"},
            "offramp": {"type": "object"},
        },
        "required": ["id", "object", "created", "model", "choices", "usage"],
    }


def _generate(summary: str, body: Schema, answer: Schema, config: ServeConfig) -> Schema:
    content = {**_json(answer), "text/event-stream": {"schema": {"type": "string"}}}
    codes = [code for code in ERRORS if code != 401 or config.api_key is not None]
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {
            "200": _answer("The texts, or a stream of them.", content),
            **{str(code): _error(code) for code in codes},
        },
        **_security(config),
    }


def _get(summary: str, content: Mapping[str, Any], config: ServeConfig, *codes: int) -> Schema:
    codes = (*codes, 403) if config.api_key is None else (*codes, 401, 403)
    return {
        "summary": summary,
        "responses": {
            "200": _answer(summary, content),
            **{str(code): _error(code) for code in codes},
        },
        **_security(config),
    }


def _security(config: ServeConfig) -> Schema:
    return {} if config.api_key is None else {"security": [{"key": []}]}


def _answer(description: str, content: Mapping[str, Any]) -> Schema:
    return {"description": description, "content": dict(content)}


def _error(code: int) -> Schema:
    return _answer(ERRORS[code], _json({"$ref": "#/components/schemas/Error"}))


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}
