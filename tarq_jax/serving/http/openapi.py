"""The OpenAPI document of a service; its schema of requests follows the schema of the served artefact."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tarq_jax.schema import ITEM_ID, Field
from tarq_jax.serving.http.options import Options
from tarq_jax.serving.http.queries import SHOWN, TOP_K, example
from tarq_jax.serving.scorer import Scorer

INTEGERS = np.iinfo(np.int64)
NUMBERS = np.finfo(np.float32)
ID = {"type": "integer", "minimum": int(INTEGERS.min), "maximum": int(INTEGERS.max)}
TEXT = {"type": "string"}


def document(scorer: Scorer, options: Options) -> dict[str, Any]:
    """OpenAPI 3.1 as a dictionary."""
    schemas = {"Request": request_schema(scorer, options), "Answer": ANSWER, "Version": VERSION,
               "Swap": SWAP, "Error": _object({"error": TEXT})}
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "tarq_jax", "version": "1", "description": "Ranks candidates for a user."},
        "components": {"schemas": schemas},
        "paths": {
            "/score": {"post": _operation(
                "Ranks candidates", "Answer", {400, 408, 413, 422, 503, 504}, takes="Request")},
            "/swap": {"post": _operation(
                "Serves another artefact, once it is warm", "Version", {400, 403, 408, 409, 413, 422, 503},
                takes="Swap")},
            "/healthz": {"get": _operation("Whether the process lives", None, set())},
            "/readyz": {"get": _operation("Whether requests should be sent here", "Version", {503})},
        }}
    for path, token in options.tokens.items():
        if token:
            described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            operation = described["paths"][path]["post"]
            operation["security"] = [{"token": []}]
            operation["responses"] |= _failures({401})
    return described


def request_schema(scorer: Scorer, options: Options) -> dict[str, Any]:
    """JSON schema of the body of /score."""
    schema, limits = scorer.schema, options.limits
    sides = {side: _object({field.name: value_schema(field) for field in schema.side(side)})
             for side in ("user", "context")}
    events = {field.name: _list(value_schema(field), limits.history) for field in schema.side("event")}
    history = _object({ITEM_ID: _list(ID, limits.history)} | events)
    history["description"] = "The oldest event first; all lists are equally long."
    candidates = _list(ID, limits.candidates) | {"type": ["array", "null"]}
    candidates["description"] = "Ids to rank; all that are served if null or left out."
    properties = sides | {
        "history": history, "candidates": candidates,
        "top_k": {"type": ["integer", "null"], "minimum": 1, "maximum": limits.top_k,
                  "default": min(TOP_K, limits.top_k)}}
    required = [side for side in sides if schema.side(side)]  # type: ignore[arg-type]
    shown = example(scorer, min(SHOWN, limits.history)) | {"top_k": min(5, limits.top_k)}
    return _object(properties, required) | {"example": shown}


def value_schema(field: Field) -> dict[str, Any]:
    """JSON schema of one value of a field."""
    if field.kind == "categorical":
        return {"type": "integer", "minimum": 0, "maximum": field.size - 1}
    number = {"type": "number", "minimum": float(NUMBERS.min), "maximum": float(NUMBERS.max)}
    return _list(number, field.size, least=field.size) if field.kind == "vector" else number


def _object(properties: dict[str, Any], required: Sequence[str] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False,
            "required": list(properties if required is None else required)}


def _list(values: dict[str, Any], most: int | None = None, least: int = 0) -> dict[str, Any]:
    bounds = {} if most is None else {"minItems": least, "maxItems": most}
    return {"type": "array", "items": values} | bounds


def _reference(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _operation(summary: str, gives: str | None, errors: set[int], takes: str | None = None) -> dict[str, Any]:
    found = {"description": "Done"} | ({"content": _reference(gives)} if gives else {})
    body = {"requestBody": {"required": True, "content": _reference(takes)}} if takes else {}
    return {"summary": summary, "responses": {"200": found} | _failures(errors)} | body


def _failures(statuses: set[int]) -> dict[str, Any]:
    return {str(status): {"description": ERRORS[status], "content": _reference("Error")}
            for status in sorted(statuses)}


ERRORS = {
    400: "The body is not JSON",
    401: "The token is missing or wrong",
    403: "The service was started without a token",
    408: "The body came too slowly",
    409: "Another swap is in progress",
    413: "The body is too large",
    422: "The request is invalid; the message names the field, its value and what was expected",
    503: "Not ready, or too busy: nothing was computed, try again after Retry-After seconds",
    504: "Not answered in time",
}
ANSWER = _object({
    "version": TEXT, "ids": _list(ID), "scores": _list({"type": "number"}), "unknown": _list(ID),
    "skipped": {"type": "integer", "minimum": 0}})
VERSION = _object({
    "version": TEXT, "method": TEXT, "items": {"type": "integer"}, "ids": _list(ID),
    "histories": _list({"type": "integer"})})
SWAP = _object({"artefact": TEXT, "index": TEXT}, ["artefact"])
