"""What OpenAPI says of the routes: their bodies are read by hand, so that FastAPI cannot know them."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from container.errors import Outage, Refusal
from container.form import IMAGES
from container.request import MaskRequest, MaskResult, TryOnRequest, TryOnResult

INVOCATIONS = {400, 408, 409, 413, 415, 422, 429, 500, 502, 503, 504}  # statuses of errors
FORMS = {408, 413, 415, 422, 429, 500, 502, 503, 504}


def describe_invocations() -> dict[str, Any]:
    """Of /invocations."""
    masks = _schema(MaskRequest)
    masks["required"] = [*masks["required"], "task"]  # without it, the same fields are a try-on's
    results = [_schema(TryOnResult), _schema(MaskResult)]
    for result in results:
        result["required"].remove("mask_cache")  # `answer` leaves it out where no photo was masked
    return {
        "responses": {200: {"content": _json({"oneOf": results})}, **describe_errors(INVOCATIONS)},
        "openapi_extra": {
            "requestBody": {"required": True, "content": _json({"oneOf": [_schema(TryOnRequest), masks]})}
        },
    }


def describe_form(fields: set[str]) -> dict[str, Any]:
    """Of /api/try-on.

    Args:
        fields: the names of the form beside those of the pictures; a request has the same.
    """
    known = _schema(TryOnRequest)["properties"]
    pictures = {name: {"type": "string", "format": "binary"} for name in IMAGES}
    asked = {
        "type": "object",
        "properties": {**pictures, **{name: known[name] for name in sorted(fields)}},
        "required": ["person_image", "cloth_image"],
        "additionalProperties": False,
    }
    texts = {name: {"type": "string"} for name in ("imageBase64", "message")}
    answered = {
        "type": "object",
        "properties": {"success": {"const": True}, **texts},
        "required": ["success", *texts],
        "additionalProperties": False,
    }
    return {
        "responses": {200: {"content": _json(answered)}, **_details(FORMS)},
        "openapi_extra": {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": asked}}}},
    }


def describe_errors(statuses: set[int]) -> dict[int | str, dict[str, Any]]:
    """Of the errors with these statuses."""
    texts = {name: {"type": "string"} for name in ("message", "request_id", "field", "object_key")}
    described: dict[int | str, dict[str, Any]] = {}
    for status in sorted(statuses):
        codes = _codes(status)
        error = {
            "type": "object",
            "properties": {
                "code": {"enum": codes},
                "retryable": {"type": "boolean"},
                "retry_after_s": {"type": "integer", "minimum": 1},
                **texts,
            },
            "required": ["code", "message", "retryable", "request_id"],
            "additionalProperties": False,
        }
        body = {"type": "object", "properties": {"error": error}, "required": ["error"], "additionalProperties": False}
        described[status] = {"description": ", ".join(codes), "content": _json(body)}
    return described


def _details(statuses: set[int]) -> dict[int | str, dict[str, Any]]:
    """Of the same errors at the REST door, where 503 is also for what is busy."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in sorted(statuses):
        codes = _codes(status) + (_codes(429) if status == 503 else [])
        properties = {"code": {"enum": codes}, "retryable": {"type": "boolean"}}
        texts = {name: {"type": "string"} for name in ("detail", "request_id")}
        body = {
            "type": "object",
            "properties": {**properties, **texts},
            "required": ["detail", "code", "retryable", "request_id"],
            "additionalProperties": False,
        }
        described[status] = {"description": ", ".join(codes), "content": _json(body)}
    return described


def _codes(status: int) -> list[str]:
    return [kind.code for kind in (*Refusal.__subclasses__(), *Outage.__subclasses__()) if kind.status == status]


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _schema(kind: type) -> dict[str, Any]:
    """The JSON Schema of a type, whose patterns are ECMAScript's: it has neither \\A nor \\z."""
    text = json.dumps(TypeAdapter(kind).json_schema())
    schema: dict[str, Any] = json.loads(text.replace(r"\\A", "^").replace(r"\\z", "$"))
    return schema
