"""The OpenAPI document of the server: what requests may hold, and what answers hold."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from offramp.serving.config import ServeConfig
from offramp.serving.schemas import Schema, chat_schema, completion_schema
from offramp.serving.values import ModelInfo, Service
from offramp.version import __version__

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
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    content = {**_json(answer), "text/event-stream": {"schema": event}}
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
