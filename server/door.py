"""The door to the queue: while that is full, nothing of a request is looked at but its path."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import EngineOverloaded
from server.errors import as_api_error
from server.metrics import ServerMetrics
from server.middleware import name_endpoint

_QUEUED = frozenset({"/v1/chat/completions", "/chat/completions", "/v1/completions", "/completions"})


class Door:
    """ASGI middleware: 503 at once for what would have to wait in a full queue.

    Ten times the load is nine refusals for each answer, on the cores that compute. The route asks again, for what has
    come in meanwhile.
    """

    def __init__(self, app: ASGIApp, *, check_room: Callable[[], None], metrics: ServerMetrics) -> None:
        """`check_room` raises `EngineOverloaded`; what else it raises is the route's to tell."""
        self._app = app
        self._check_room = check_room
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in _QUEUED:
            try:
                self._check_room()
            except EngineOverloaded as exc:
                self._metrics.reject("queue_full")
                name_endpoint(scope, scope["path"])
                await as_api_error(exc).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)
