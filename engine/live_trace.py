"""The asking side of a recording, on the event loop. What goes to the engine and comes back are messages."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable

from engine.errors import RecordingInProgress
from engine.messages import StartTrace, StopTrace, TraceRecorded


class LiveTrace:
    """One recording at a time. All calls from one event loop."""

    def __init__(self, send: Callable[[StartTrace | StopTrace], None]) -> None:
        self._send = send
        self._asked: StartTrace | None = None
        self._answer: asyncio.Future[TraceRecorded] | None = None

    async def record(self, *, seconds: float, max_tokens: int, domain: str) -> TraceRecorded:
        """The answer may be an error. Cancelled, what was recorded is thrown away. Raises `RecordingInProgress`."""
        if self._asked is not None:
            raise RecordingInProgress("the routing is being recorded already; one recording at a time")
        loop = asyncio.get_running_loop()
        asked = self._asked = StartTrace(uuid.uuid4().hex, max_tokens, domain)
        self._answer = loop.create_future()
        self._send(asked)
        timer = loop.call_later(seconds, self._send, StopTrace(asked.trace_id))
        try:
            return await self._answer
        finally:
            timer.cancel()
            self._asked = self._answer = None
            self._send(StopTrace(asked.trace_id, discard=True))

    def end(self) -> bool:
        """The recording ends now, and is answered; False: there is none."""
        if self._asked is None:
            return False
        self._send(StopTrace(self._asked.trace_id))
        return True

    def deliver(self, recorded: TraceRecorded) -> None:
        """What the engine answers; to nobody, if that was cancelled meanwhile."""
        if self._asked is None or self._answer is None or self._asked.trace_id != recorded.trace_id:
            return
        if not self._answer.done():
            self._answer.set_result(recorded)

    def fail(self, error: str) -> None:
        """The engine will not answer any more."""
        if self._asked is not None:
            self.deliver(TraceRecorded(trace_id=self._asked.trace_id, error=error))
