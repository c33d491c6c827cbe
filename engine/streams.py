"""What has come for a request and was not read yet: of a slow reader it is merged, so that it stays one answer long."""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec

from engine.messages import RequestOutput

_MAX_PENDING = 16  # outputs that are kept apart


class Stream:
    """One writer, one reader, both on the event loop."""

    def __init__(self) -> None:
        self._pending: deque[RequestOutput] = deque()
        self._late: list[RequestOutput] = []  # to be merged when it is read
        self._arrived = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """Never waits."""
        if len(self._pending) < _MAX_PENDING:
            self._pending.append(output)
        else:
            self._late.append(output)
            if len(self._late) >= _MAX_PENDING * 4:
                self._late = [merged(self._late)]
        self._arrived.set()

    async def get(self) -> RequestOutput:
        """The next one; those that have been waiting behind many come as one."""
        while not self._pending:
            if self._late:
                self._pending.append(merged(self._late))
                self._late = []
                break
            self._arrived.clear()
            await self._arrived.wait()
        return self._pending.popleft()


def merged(outputs: list[RequestOutput]) -> RequestOutput:
    """As one: what they add is joined, their totals and their end are the last one's."""
    changes: dict[str, object] = {"text": "".join(output.text for output in outputs)}
    for name in RequestOutput.__struct_fields__:
        parts = [part for output in outputs if isinstance(part := getattr(output, name), list)]
        if parts:
            changes[name] = [one for part in parts for one in part]
    return msgspec.structs.replace(outputs[-1], **changes)
