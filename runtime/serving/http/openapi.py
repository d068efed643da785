"""The paths of the server in OpenAPI's form, made of what reads the bodies."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from vkvx import __version__
from vkvx.runtime.serving.http.schema import ChatRequest, CompletionRequest

_TEXT, _JSON = {"type": "string"}, "application/json"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": _TEXT,
        "object": _TEXT,
        "created": {"type": "integer"},
        "model": _TEXT,
        "choices": {"type": "array", "items": {"type": "object"}},
        "usage": {"type": "object"},
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {"id": _TEXT, "object": _TEXT, "created": {"type": "integer"}, "owned_by": _TEXT},
}
_MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": _TEXT, "data": {"type": "array", "items": _MODEL}},
}
_GENERATION_ERRORS = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


def description(model: str | None) -> dict[str, Any]:
    """The document of ``/openapi.json``; ``model`` is the one name that requests may give, None if it is not known."""
    kinds: dict[str, type[BaseModel]] = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
    template = "#/components/schemas/{model}"
    names, found = models_json_schema([(kind, "validation") for kind in kinds.values()], ref_template=template)
    schemas = found["$defs"]
    if model is not None:
        for kind in kinds.values():
            schemas[kind.__name__]["properties"]["model"] = {"const": model}
    paths = {path: {"post": _generation(names[kind, "validation"])} for path, kind in kinds.items()}
    name = {"name": "name", "in": "path", "required": True, "schema": _TEXT}
    paths |= {
        "/v1/models": {"get": _operation({_JSON: _MODELS}, (401, 403, 503), secured=True)},
        "/v1/models/{name}": {
            "get": _operation({_JSON: _MODEL}, (401, 403, 404, 503), secured=True) | {"parameters": [name]}
        },
        "/health": {"get": _operation({_JSON: {"type": "object"}}, (403, 503))},
        "/metrics": {"get": _operation({"text/plain": _TEXT}, (403,))},
        "/openapi.json": {"get": _operation({_JSON: {"type": "object"}}, (403,))},
        "/": {"get": _operation({"text/html": _TEXT}, (403,))},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "vkvx", "version": __version__, "description": "Errors are in OpenAI's form."},
        "paths": paths,
        "components": {
            "schemas": schemas | {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _generation(body: dict[str, Any]) -> dict[str, Any]:
    operation = _operation({_JSON: _ANSWER, "text/event-stream": {}}, _GENERATION_ERRORS, secured=True)
    return operation | {"requestBody": {"required": True, "content": {_JSON: {"schema": body}}}}


def _operation(content: dict[str, Any], errors: tuple[int, ...], *, secured: bool = False) -> dict[str, Any]:
    """What a path answers, by media type, and the errors that it knows; a key may be wanted where it is ``secured``."""
    refusal = {"description": "Refused", "content": {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
    answer = {"description": "Done", "content": {kind: {"schema": schema} for kind, schema in content.items()}}
    found: dict[str, Any] = {"responses": {"200": answer} | {str(status): refusal for status in errors}}
    return found | ({"security": [{}, {"key": []}]} if secured else {})
