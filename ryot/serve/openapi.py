"""The server's description of itself: OpenAPI 3.1, at `/openapi.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ryot import __version__
from ryot.serve.chat import ROLES
from ryot.serve.constraints import MAX_PATTERN_LENGTH
from ryot.serve.params import MAX_CHOICES, MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOPS

Schema = dict[str, Any]

#: Why a request may be refused. 500 is none of them.
REFUSALS = {
    400: "A field is wrong, or the prompt does not fit; `param` names it",
    401: "The API key is missing or wrong",
    403: "Sent to a name that is not this machine's",
    404: "There is no such model or path",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is no JSON",
    429: "Too many requests wait; `Retry-After` says how long to",
    503: "The server loads its models, or ends",
    504: "The answer took too long",
}


def describe_api() -> Schema:
    """The document."""
    chat = _object({**_shared(), **_chat()}, required=["messages"])
    response = _object(_response(), required=["input"])
    text = _object({**_shared(), **_text()}, required=["prompt"])
    tokens = _object({"tokens": _list(_whole(0)), "count": _whole(0), "max_model_len": _whole(1)})
    status = _object({"status": {"type": "string"}, "models": _list({"type": "string"})}, required=["status"])
    paths = {
        "/": {"get": _text_operation("A page to chat with the models", "text/html")},
        "/v1/models": {"get": _operation("The models that are served", None, _list_of("model"))},
        "/v1/models/{name}": {
            "get": _operation("One of them", None, _item_of("model"))
            | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
        },
        "/v1/completions": {"post": _operation("Go on with a text", text, _answer("text_completion"), stream=True)},
        "/v1/chat/completions": {
            "post": _operation("Answer a conversation", chat, _answer("chat.completion"), stream=True)
        },
        "/v1/responses": {
            "post": _operation(
                "Answer a conversation, as OpenAI's newer API", response, _response_answer(), stream=True
            )
        },
        "/admin/reload": {
            "post": _operation(
                "Take the bundles from their folders again",
                _object({}),
                _object({"reloaded": _list({"type": "string"})}, required=["reloaded"]),
                refusals=REFUSALS | {409: "A bundle cannot be loaded; what is served stays"},
            )
        },
        "/tokenize": {
            "post": _operation(
                "The ids of a text or a conversation",
                _object(
                    {
                        "model": _nullable({"type": "string"}),
                        "prompt": {"type": "string"},
                        "messages": _list(_message()),
                        "add_special_tokens": _flag(),
                        "chat_template_kwargs": _nullable({"type": "object"}),
                    }
                ),
                tokens,
            )
        },
        "/detokenize": {
            "post": _operation(
                "The text of ids",
                _object({"model": _nullable({"type": "string"}), "tokens": _list(_whole(0))}, required=["tokens"]),
                _object({"prompt": {"type": "string"}}),
            )
        },
        "/health": {"get": _status_operation("Whether the process lives, and its models' engines", status)},
        "/ready": {"get": _status_operation("Whether requests are answered", status)},
        "/metrics": {"get": _text_operation("Figures for Prometheus", "text/plain")},
        "/openapi.json": {"get": _operation("This document", None, {"type": "object"})},
    }
    key = {"key": {"type": "http", "scheme": "bearer"}}
    error = _object(
        {
            "message": {"type": "string"},
            "type": {"type": "string"},
            "param": _nullable({"type": "string"}),
            "code": _nullable({"type": "string"}),
        },
        required=["message", "type", "param", "code"],
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "ryot", "version": __version__, "description": "OpenAI's API on an edge runtime"},
        "paths": paths,
        "components": {"schemas": {"Error": _object({"error": error}, required=["error"])}, "securitySchemes": key},
        "security": [{}, {"key": []}],
    }


def _operation(
    summary: str,
    body: Schema | None,
    answer: Schema,
    *,
    stream: bool = False,
    refusals: Mapping[int, str] = REFUSALS,
) -> Schema:
    content: Schema = {"application/json": {"schema": answer}}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    found: Schema = {"summary": summary, "responses": {"200": {"description": "The answer", "content": content}}}
    found["responses"] |= _refusals(refusals)
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return found


def _text_operation(summary: str, media_type: str) -> Schema:
    content = {media_type: {"schema": {"type": "string"}}}
    return {"summary": summary, "responses": {"200": {"description": "Text", "content": content}} | _refusals(REFUSALS)}


def _status_operation(summary: str, status: Schema) -> Schema:
    found = _operation(summary, None, status)
    found["responses"]["503"] = {"description": "Not so", "content": {"application/json": {"schema": status}}}
    return found


def _refusals(refusals: Mapping[int, str]) -> Schema:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": why, "content": content} for status, why in refusals.items()}


def _shared() -> dict[str, Schema]:
    return {
        "model": _nullable({"type": "string", "description": "May be left out where one model is served"}),
        "max_tokens": _nullable(_whole(0)),
        "temperature": _nullable(_number(0, 2)),
        "top_p": _nullable(_number(0, 1)),
        "top_k": _nullable(_whole(-1)),
        "min_p": _nullable(_number(0, 1)),
        "n": _nullable(_whole(1, MAX_CHOICES)),
        "stream": _flag(),
        "stop": {
            "anyOf": [
                {"type": "null"},
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
                _list({"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}) | {"maxItems": MAX_STOPS},
            ]
        },
        "presence_penalty": _nullable(_number(-2, 2)),
        "frequency_penalty": _nullable(_number(-2, 2)),
        "repetition_penalty": _nullable({"type": "number", "exclusiveMinimum": 0, "maximum": 100}),
        "logit_bias": _nullable({"type": "object", "additionalProperties": _number(-100, 100)}),
        "seed": _nullable({"type": "integer"}),
        "ignore_eos": _flag(),
        "response_format": _nullable(
            _object(
                {
                    "type": {"enum": ["text", "json_object", "json_schema", "regex", "grammar"]},
                    "json_schema": {"type": "object"},
                    "regex": {"type": "string", "maxLength": MAX_PATTERN_LENGTH},
                    "grammar": {"type": "string", "maxLength": MAX_PATTERN_LENGTH},
                },
                required=["type"],
            )
        ),
        "user": _nullable({"type": "string"}),
    }


def _text() -> dict[str, Schema]:
    ids = _list(_whole(0)) | {"minItems": 1}
    return {
        "prompt": {"anyOf": [{"type": "string"}, ids, _list({"anyOf": [{"type": "string"}, ids]}) | {"minItems": 1}]},
        "echo": _flag(),
        "best_of": _nullable(_whole(1, MAX_CHOICES)),
        "logprobs": _nullable(_whole(0, MAX_LOGPROBS)),
    }


def _chat() -> dict[str, Schema]:
    return {
        "messages": _list(_message()) | {"minItems": 1},
        "max_completion_tokens": _nullable(_whole(0)),
        "logprobs": _flag(),
        "top_logprobs": _nullable(_whole(0, MAX_LOGPROBS)),
        "tools": _nullable(_list({"type": "object"})),
        "tool_choice": {"anyOf": [{"type": "null"}, {"enum": ["none", "auto", "required"]}, {"type": "object"}]},
    }


def _response() -> dict[str, Schema]:
    part = _object({"type": {"const": "input_text"}, "text": {"type": "string"}}, required=["type", "text"])
    content = {"anyOf": [{"type": "string"}, _list(part)]}
    item = _object({"role": {"enum": list(ROLES)}, "content": content}, required=["role", "content"])
    shared = ("model", "temperature", "top_p", "stream", "seed", "top_k", "min_p", "ignore_eos", "stop", "user")
    return {name: schema for name, schema in _shared().items() if name in shared} | {
        "input": {"anyOf": [{"type": "string"}, _list(item) | {"minItems": 1}]},
        "instructions": _nullable({"type": "string"}),
        "max_output_tokens": _nullable(_whole(1)),
        "text": _nullable(_object({"format": _object({"type": {"enum": ["text", "json_object"]}}, required=["type"])})),
        "tools": _nullable(_list({"type": "object"})),
        "tool_choice": {"anyOf": [{"type": "null"}, {"enum": ["none", "auto", "required"]}, {"type": "object"}]},
    }


def _response_answer() -> Schema:
    usage = _object({name: _whole(0) for name in ("input_tokens", "output_tokens", "total_tokens")})
    return _object(
        {
            "id": {"type": "string"},
            "object": {"const": "response"},
            "created_at": _whole(0),
            "model": {"type": "string"},
            "status": {"enum": ["completed", "incomplete"]},
            "output": _list({"type": "object"}),
            "usage": usage,
        },
        required=["id", "object", "created_at", "model", "status", "output", "usage"],
    )


def _message() -> Schema:
    part = _object({"type": {"const": "text"}, "text": {"type": "string"}}, required=["type", "text"])
    content = {"anyOf": [{"type": "string"}, _list(part)]}
    return _object({"role": {"enum": list(ROLES)}, "content": content}, required=["role", "content"])


def _answer(kind: str) -> Schema:
    usage = _object({name: _whole(0) for name in ("prompt_tokens", "completion_tokens", "total_tokens")})
    return _object(
        {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": _whole(0),
            "model": {"type": "string"},
            "choices": _list({"type": "object"}),
            "usage": usage,
        },
        required=["id", "object", "created", "model", "choices", "usage"],
    )


def _list_of(kind: str) -> Schema:
    return _object({"object": {"const": "list"}, "data": _list(_item_of(kind))}, required=["object", "data"])


def _item_of(kind: str) -> Schema:
    return _object({"id": {"type": "string"}, "object": {"const": kind}}, required=["id", "object"])


def _object(properties: dict[str, Schema], required: list[str] | None = None) -> Schema:
    return {"type": "object", "properties": properties, "required": required or []}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _flag() -> Schema:
    return {"type": ["boolean", "null"]}


def _whole(low: int, high: int | None = None) -> Schema:
    return {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high})


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}
