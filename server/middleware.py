"""Around every request: an id, a count, and an error object for what nobody else caught."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ClientGone, as_api_error
from server.metrics import ServerMetrics
from server.request_log import LoggedRequest, RequestLog

_log = logging.getLogger("foregate.server")
_SANE_ID = re.compile(r"[\w.:+/=-]{1,128}", re.ASCII)
_KEY, _ENDPOINT = "foregate.record", "foregate.endpoint"


@dataclass(slots=True)
class RequestRecord:
    """What is known of one HTTP request; routes fill in what only they know."""

    request_id: str
    started_s: float
    stream: bool = False
    finish_reason: str = ""
    client_gone: bool = False
    status: int = 500
    logged: LoggedRequest | None = None
    response_started: bool = field(default=False, init=False)

    @property
    def code(self) -> str:
        """The HTTP status, or 499 where the client left before the answer was complete."""
        return "499" if self.client_gone else str(self.status)


def record_of(request: Request) -> RequestRecord:
    record = request.scope[_KEY]
    assert isinstance(record, RequestRecord)
    return record


class RequestObserver:
    """ASGI middleware, the outermost: `x-request-id`, `foregate_requests_total`, and 500 for the unforeseen."""

    def __init__(
        self, app: ASGIApp, *, metrics: ServerMetrics, requests: RequestLog, clock: Callable[[], float]
    ) -> None:
        self._app = app
        self._requests = requests
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope), self._clock())
        scope[_KEY] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.response_started = True
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            record.client_gone = True
        except Exception as exc:
            _log.exception("request %s failed", record.request_id)
            if not record.response_started:
                await as_api_error(exc).response()(scope, receive, send_with_id)
        finally:
            endpoint = endpoint_of(scope)
            if record.logged is not None:
                self._requests.end(record.logged)
            else:
                self._requests.refuse(record, endpoint)
            self._metrics.count_request(
                endpoint=endpoint,
                code=record.code,
                finish_reason=record.finish_reason,
                stream=record.stream,
            )


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def endpoint_of(scope: Scope) -> str:
    """The route's pattern, never the path as sent, which would be an unbounded label."""
    return str(scope.get(_ENDPOINT) or getattr(scope.get("route"), "path", "other"))


def name_endpoint(scope: Scope, pattern: str) -> None:
    """Of a request that is answered before it comes to its route."""
    scope[_ENDPOINT] = pattern
