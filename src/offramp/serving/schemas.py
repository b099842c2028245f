"""The schemas of the bodies of requests, for the OpenAPI document."""

import math
from typing import Any

from offramp.generation.config import MOST_DRAFTS, PENALTIES
from offramp.serving.bodies import IGNORED, MOST_LOGPROBS, MOST_STOPS, OF_DRAFTS, ROLES
from offramp.serving.values import ModelInfo

Schema = dict[str, Any]
LARGEST = (1 << 63) - 1


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
        "additionalProperties": False,
    }
    message = {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]},
            "name": {"type": ["string", "null"]},
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
    rules = (
        _if({"top_logprobs": {"type": "integer"}}, {"logprobs": {"const": True}}),
        _if(
            {"max_tokens": {"type": "integer"}},
            {"max_completion_tokens": {"type": "null"}},
            needs=(),
        ),
    )
    return _body(properties, ["messages"], *rules)


def _body(properties: Schema, required: list[str], *rules: Schema) -> Schema:
    share = {"type": "number", "minimum": 0, "maximum": 1}
    shares = {"anyOf": [share, {"type": "array", "items": share}]}
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        "allOf": [
            # drafts are verified at full depth
            _if({"speculative": {"const": True}}, {"threshold": {"type": "null"}}, needs=()),
            _if(
                {"speculative": {"const": True}},
                {"confidence": {"not": {"enum": ["patience", "saturation"]}}},
                needs=(),
            ),
            *(
                _if({name: {"type": "number"}}, {"speculative": {"const": True}})
                for name in OF_DRAFTS
            ),
            _if({"decay": {"type": "number"}}, {"threshold": shares}),
            *rules,
        ],
    }


def _if(has: Schema, then: Schema, *, needs: tuple[str, ...] | None = None) -> Schema:
    """Return the rule that a body which has some values also has others."""
    needed = list(then) if needs is None else list(needs)
    return {
        "if": {"properties": has, "required": list(has)},
        "then": {"properties": then, "required": needed},
    }


def _common(about: ModelInfo) -> Schema:
    stop = {"type": "string", "minLength": 1}
    token = {"type": "integer", "minimum": 0, "maximum": about.vocab_size - 1}
    number: Schema = {"type": "number"}
    early = about.exit_layers[:-1]
    cap = about.certificate
    threshold: Schema = {"type": "null"}
    if early:
        least = -math.inf if cap is None else max(cap.thresholds)
        bounded = number if least == -math.inf else number | {"minimum": least}
        one = {"const": "inf"} if least == math.inf else {"anyOf": [bounded, {"const": "inf"}]}
        several = {"minItems": len(early), "maxItems": len(early)}
        threshold = _maybe(one, {"type": "array", "items": one, **several})
    return {
        "model": _maybe({"type": "string", "enum": [about.id]}),
        "max_tokens": _tokens(about),
        "stop": _maybe(stop, {"type": "array", "items": stop, "maxItems": MOST_STOPS}),
        "seed": _maybe({"type": "integer", "minimum": 0, "maximum": LARGEST}),
        "temperature": _maybe(number | {"minimum": 0}),
        "top_p": _maybe(number | {"exclusiveMinimum": 0, "maximum": 1}),
        "top_k": _maybe({"type": "integer", "minimum": -1, "maximum": LARGEST}),
        "repetition_penalty": _maybe(number | {"minimum": PENALTIES[0], "maximum": PENALTIES[1]}),
        "stop_token_ids": _maybe({"type": "array", "items": token}),
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
        "decay": _maybe(number | {"minimum": 0}) if early and cap is None else {"type": "null"},
        "confidence": _maybe({"enum": list(about.confidences)}) if early else {"type": "null"},
        "missing_kv": _maybe(
            {"enum": ["propagate", "recompute"] if cap is None else [cap.missing_kv]}
        ),
        "speculative": _maybe({"type": "boolean"} if early else {"const": False}),
        "draft_exit": _maybe({"enum": list(early)}) if early else {"type": "null"},
        "draft_threshold": _maybe(number) if early else {"type": "null"},
        "max_drafts": _maybe({"type": "integer", "minimum": 1, "maximum": MOST_DRAFTS})
        if early
        else {"type": "null"},
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
