"""/openapi.json, as OpenAPI 3.1: routes read and write their bodies themselves, so FastAPI does not see the types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.auth import OPEN_PATHS
from server.errors import ErrorBody

_REFERENCE = "#/components/schemas/"
_METHODS = ("get", "post", "put", "delete")

# answers besides the good one, by whether there is a body; the text says when
_ERRORS = {"404": "there is no such model or thing", "500": "the server's fault", "503": "not now; see Retry-After"}
_BODY_ERRORS = {
    "400": "the request cannot be honoured as it is; `param` names the reason",
    "413": "the body is too large",
    "415": "the body is not JSON",
}


def json_body(
    kind: type[BaseModel], answer: type[msgspec.Struct] | None = None, *, stream: type[msgspec.Struct] | None = None
) -> dict[str, Any]:
    """For a route's `openapi_extra`: what it takes, what it answers, and what the events of its stream are."""
    operation: dict[str, Any] = {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(kind)}}}
    }
    if answer is not None:
        operation |= json_answer(answer)
    if stream is not None:
        data = {"type": "string", "description": f"JSON of a {stream.__name__} or an ErrorBody; at the end [DONE]."}
        schema = {"type": "object", "description": "One event.", "properties": {"data": data}, "required": ["data"]}
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": schema}
    return operation


def json_answer(kind: type[msgspec.Struct], *also: str) -> dict[str, Any]:
    """For a route's `openapi_extra`: what it answers with 200, and with the statuses in `also`."""
    content = {"application/json": {"schema": _reference(kind)}}
    return {"responses": {status: {"description": kind.__name__, "content": content} for status in ("200", *also)}}


def other_answer(media_type: str) -> dict[str, Any]:
    """For a route's `openapi_extra`: an answer that is not JSON."""
    return {"responses": {"200": {"description": media_type, "content": {media_type: {}}}}}


def describe(
    app: FastAPI, bodies: Sequence[type[BaseModel]], answers: Sequence[type[msgspec.Struct]], *, needs_key: bool
) -> None:
    """Make `app.openapi()` define what `json_body` and `json_answer` point to, and the errors of every operation."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            template = _REFERENCE + "{model}"
            _, definitions = models_json_schema([(kind, "validation") for kind in bodies], ref_template=template)
            _, structs = msgspec.json.schema_components([*answers, ErrorBody], ref_template=_REFERENCE + "{name}")
            components.update({**definitions["$defs"], **structs})
            for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, never sent
                components.pop(name, None)
            for path, item in schema["paths"].items():
                for method in _METHODS:
                    if method in item:
                        _complete(path, item[method], needs_key=needs_key and path not in OPEN_PATHS)
            if needs_key:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(path: str, operation: dict[str, Any], *, needs_key: bool) -> None:
    responses = operation["responses"]
    errors = _ERRORS | (_BODY_ERRORS if "requestBody" in operation else {})
    if responses.pop("422", None):  # FastAPI's own, which we send as 400
        errors |= {"400": _BODY_ERRORS["400"]}
    if needs_key:
        operation["security"] = [{"key": []}]
        errors |= {"401": "the API key is wrong or missing"}
    elif path.startswith("/admin"):
        errors |= {"403": "without an API key, only for requests of this machine to itself"}
    for status, text in sorted(errors.items()):
        content = {"application/json": {"schema": _reference(ErrorBody)}}
        responses.setdefault(status, {"description": text, "content": content})


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": _REFERENCE + kind.__name__}
