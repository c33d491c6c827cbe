"""Request bodies: read within the size limit, parsed strictly, every failure an answer that names the parameter."""

from __future__ import annotations

import asyncio
import logging
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from server.context import AppContext
from server.errors import ApiError, BadRequest, ClientGone
from server.protocol.fields import Body
from server.protocol.refusals import refuse_unsupported
from server.settings import AppSettings

_log = logging.getLogger("foregate.server")
_MAX_SUB_ERRORS = 10
_SMALL_NBYTES = 256 * 1024  # takes a few milliseconds


BodyT = TypeVar("BodyT", bound=Body)


async def read_body(request: Request, kind: type[BodyT], ctx: AppContext) -> BodyT:
    """The request's JSON as a `kind`; raises `ApiError` 400, 413 or 415, or `ClientGone`.

    A large one is parsed on a thread, one at a time, while the event loop goes on.
    """
    _check_content_type(request)
    raw = await _read_limited(request, ctx.settings.max_body_nbytes)
    if len(raw) <= _SMALL_NBYTES:
        body = _parse(raw, kind)
    else:
        async with ctx.large_bodies:
            body = await asyncio.to_thread(_parse_large, raw, kind, ctx.settings)
    unknown = refuse_unsupported(body.model_extra or {})
    if unknown and ctx.settings.strict_requests:
        raise BadRequest(f"unknown parameter: {unknown[0][:100]}", param=unknown[0][:100], code="unknown_parameter")
    for name in unknown:
        if ctx.unknown_fields.is_new(name):
            _log.warning("ignoring the unknown request field %r; this is said once for each name", name[:100])
    return body


def _parse(raw: bytes, kind: type[BodyT]) -> BodyT:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as exc:
        raise _refusal(exc) from None


def _parse_large(raw: bytes, kind: type[BodyT], settings: AppSettings) -> BodyT:
    # millions of numbers, or hundreds of thousands of objects, take seconds in which no other thread may run
    if raw.count(b",") >= settings.max_body_values:
        message = f"the body has more than {settings.max_body_values} values or commas"
        raise ApiError(413, message, code="request_too_large")
    if _num_members(raw, settings.max_body_members) > settings.max_body_members:
        message = f"the objects in the body have more than {settings.max_body_members} members"
        raise ApiError(413, message, code="request_too_large")
    return _parse(raw, kind)


def _num_members(raw: bytes, enough: int) -> int:
    """Of the objects of a JSON text, or a number up to `enough`. A string that begins with a colon counts too."""
    num_colons = raw.count(b":")
    if num_colons <= enough:
        return num_colons
    bare = raw.translate(None, b" \t\r\n").replace(b"\\\\", b"")  # then a backslash before a quotation mark escapes it
    return bare.count(b'":') - bare.count(b'\\":')


def _check_content_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise ApiError(
            415, "the body must be JSON; send `Content-Type: application/json`", code="unsupported_media_type"
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not supported", code="unsupported_media_type")


async def _read_limited(request: Request, limit: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    parts: list[bytes] = []
    nbytes = 0
    try:
        async for part in request.stream():
            nbytes += len(part)
            if nbytes > limit:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise ClientGone from None
    return b"".join(parts)


def _refusal(exc: ValidationError) -> ApiError:
    """The first problems in words, and the first one's parameter."""
    details = exc.errors(include_url=False, include_context=False, include_input=False)
    first = details[0]
    if first["type"] == "json_invalid":
        return BadRequest(
            f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    if not first["loc"]:
        return BadRequest("the body must be a JSON object")
    message = "; ".join(_sentence(detail) for detail in details[:_MAX_SUB_ERRORS])
    return BadRequest(message, param=_param(first))


def _sentence(detail: ErrorDetails) -> str:
    return f"{_param(detail)}: {detail['msg'][:300]}"


def _param(detail: ErrorDetails) -> str:
    """('messages', 0, 'role') -> 'messages[0].role'."""
    name = ""
    for part in detail["loc"]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name[:200]
