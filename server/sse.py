"""Server-sent events: a stream that ends with [DONE] whatever happens, and ends at once when the client goes."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.messages import RequestOutput
from server.errors import as_api_error
from server.generation import Outputs, disconnected
from server.middleware import RequestRecord

_log = logging.getLogger("foregate.server")

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": keep-alive\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(message: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(message) + b"\n\n"


class Chunker(Protocol):
    """Turns outputs into events."""

    def events(self, index: int, output: RequestOutput) -> bytes:
        """The events for one output of one choice; empty when there is nothing to tell."""

    def last_events(self) -> bytes:
        """The events after all choices have ended."""


class EventStream(Response):
    """`first` has been awaited already, so that whatever fails before it was still a plain HTTP error."""

    def __init__(
        self,
        first: tuple[int, RequestOutput],
        outputs: Outputs,
        chunker: Chunker,
        record: RequestRecord,
        *,
        heartbeat_s: float,
        send_timeout_s: float,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = "text/event-stream"
        self.init_headers(HEADERS)
        self._first = first
        self._outputs = outputs
        self._chunker = chunker
        self._record = record
        self._heartbeat_s = heartbeat_s
        self._send_timeout_s = send_timeout_s
        self._last_sent_s = 0.0
        self._sending_since_s: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        producing = asyncio.ensure_future(self._produce(send))
        watching = asyncio.ensure_future(disconnected(receive))
        beating = asyncio.ensure_future(self._beat(send))
        try:
            await asyncio.wait({producing, watching, beating}, return_when=asyncio.FIRST_COMPLETED)
            self._record.client_gone = not producing.done()
        finally:
            for task in (producing, watching, beating):
                task.cancel()
            await asyncio.gather(producing, watching, beating, return_exceptions=True)
            await self._outputs.aclose()
        if not self._record.client_gone:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _produce(self, send: Send) -> None:
        try:
            await self._tell(send, *self._first)
            async for index, output in self._outputs:
                await self._tell(send, index, output)
            await self._send(send, self._chunker.last_events() + DONE)
        except OSError:
            self._record.client_gone = True
        except Exception as exc:
            error = as_api_error(exc)
            if error.code == "internal_error":
                _log.exception("a stream failed")
            self._record.finish_reason = "error"
            await self._send(send, b"data: " + error.json() + b"\n\n" + DONE)

    async def _tell(self, send: Send, index: int, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            self._record.finish_reason = output.finish_reason
        await self._send(send, self._chunker.events(index, output))

    async def _send(self, send: Send, events: bytes) -> None:
        if events:
            now_s = asyncio.get_running_loop().time
            self._sending_since_s = now_s()
            await send({"type": "http.response.body", "body": events, "more_body": True})
            self._last_sent_s, self._sending_since_s = now_s(), None

    async def _beat(self, send: Send) -> None:
        """Until the client has read nothing for too long; no heartbeat is sent to one that does not read."""
        loop = asyncio.get_running_loop()
        self._last_sent_s = loop.time()
        while True:
            if self._sending_since_s is not None:
                left_s = self._sending_since_s + self._send_timeout_s - loop.time()
                if left_s <= 0:
                    return
                await asyncio.sleep(min(left_s, self._heartbeat_s))
                continue
            silent_s = loop.time() - self._last_sent_s
            if silent_s >= self._heartbeat_s:
                await self._send(send, HEARTBEAT)
            else:
                await asyncio.sleep(self._heartbeat_s - silent_s)
