"""What goes wrong, in OpenAI's words: one error object for every failure, without tracebacks, paths or addresses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from engine.errors import EngineDead, EngineOverloaded, InvalidRequest, RecordingInProgress

MAX_MESSAGE_CHARS = 2000
_PATH = re.compile(r"(?<![\w:/])(?:/[\w.+@-]+){2,}/?")


class ErrorObject(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorObject


class ApiError(Exception):
    """An answer that is an error: HTTP status, OpenAI's `type`, the parameter at fault and a code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 3] + "..."
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def json(self) -> bytes:
        return msgspec.json.encode(ErrorBody(ErrorObject(self.message, self.kind, self.param, self.code)))

    def response(self) -> Response:
        return Response(self.json(), status_code=self.status, headers=self.headers, media_type="application/json")


class BadRequest(ApiError):
    """400: the request cannot be honoured as it is."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(400, message, param=param, code=code)


class Unavailable(ApiError):
    """503: not now; the client may retry after `retry_after_s`."""

    def __init__(self, message: str, *, code: str, retry_after_s: float = 1.0) -> None:
        headers = {"Retry-After": str(max(1, math.ceil(retry_after_s)))}
        super().__init__(503, message, kind="server_error", code=code, headers=headers)


class GenerationFailed(Exception):
    """The engine gave up on a request that it had accepted; the text says why."""


class ClientGone(Exception):
    """Nobody is connected any more to read the answer."""


def as_api_error(exc: BaseException) -> ApiError:
    """The answer for any exception. What is not known is a plain 500 which tells nothing of the inside."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, InvalidRequest):
        return BadRequest(str(exc), param=exc.param, code=exc.code)
    if isinstance(exc, EngineOverloaded):
        return Unavailable(str(exc), code="overloaded", retry_after_s=exc.retry_after_s)
    if isinstance(exc, RecordingInProgress):
        return ApiError(409, str(exc), code="recording_in_progress")
    if isinstance(exc, EngineDead):
        return Unavailable(without_paths(str(exc)) or "the engine is not running", code="engine_unavailable")
    if isinstance(exc, GenerationFailed):
        return ApiError(500, without_paths(str(exc)), kind="server_error", code="generation_failed")
    if isinstance(exc, RequestValidationError):  # of what is in the path or the query
        first = exc.errors()[0]
        name = str(first["loc"][-1])
        return BadRequest(f"{name}: {first['msg']}", param=name)
    if isinstance(exc, HTTPException):
        return _from_http(exc)
    return ApiError(500, "internal server error", kind="server_error", code="internal_error")


def without_paths(text: str) -> str:
    """Replace absolute file paths: "cannot read /home/a/b.bin" -> "cannot read <path>"."""
    return _PATH.sub("<path>", text)


def _from_http(exc: HTTPException) -> ApiError:
    message, code = {
        404: ("there is no such route", "not_found"),
        405: ("this method is not allowed on this route", "method_not_allowed"),
    }.get(exc.status_code, (str(exc.detail), None))
    kind = "invalid_request_error" if exc.status_code < 500 else "server_error"
    return ApiError(exc.status_code, message, kind=kind, code=code, headers=exc.headers)
