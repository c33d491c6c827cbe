"""What has come for a request and was not read yet: of a slow reader it is merged, so that it stays one answer long."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from engine.config import SchedulerConfig
from engine.errors import EngineOverloaded
from engine.messages import RequestOutput, failed_output

_MAX_PENDING = 16  # outputs that are kept apart


class Stream:
    """One writer, one reader, both on the event loop."""

    def __init__(self, num_tokens: int = 0) -> None:
        """`num_tokens`: of the prompt."""
        self.num_queued = num_tokens  # until something has been read
        self._pending: deque[RequestOutput] = deque()
        self._late: list[RequestOutput] = []  # to be merged when it is read
        self._arrived = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """Never waits."""
        if not self._late and len(self._pending) < _MAX_PENDING:  # what is late goes before what comes later
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
        self.num_queued = 0
        return self._pending.popleft()


class Streams:
    """Of the requests that are in the engine, by their ids. All calls from one event loop."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._streams: dict[str, Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def require_room(self, num_tokens: int) -> None:
        """Raise `EngineOverloaded` if one more prompt, so long, cannot wait."""
        config = self._config
        if len(self._streams) >= config.max_num_seqs + config.waiting_limit:
            raise EngineOverloaded(f"the queue is full ({config.waiting_limit} requests wait)")
        num_queued = sum(stream.num_queued for stream in self._streams.values())
        if num_queued and num_queued + num_tokens > config.max_queued_tokens:
            raise EngineOverloaded(f"the queue is full (prompts of {num_queued} tokens wait)")

    @contextmanager
    def opened(self, request_id: str, num_tokens: int) -> Iterator[Stream]:
        """Of a new request with a prompt so long."""
        stream = self._streams[request_id] = Stream(num_tokens)
        try:
            yield stream
        finally:
            del self._streams[request_id]

    def put(self, output: RequestOutput) -> None:
        """To nobody, if the client left meanwhile."""
        stream = self._streams.get(output.request_id)
        if stream is not None:
            stream.put(output)

    def fail(self, error: str) -> None:
        """Nothing more will come for any of them."""
        for request_id, stream in self._streams.items():
            stream.put(failed_output(request_id, error))


def merged(outputs: list[RequestOutput]) -> RequestOutput:
    """As one: what they add is joined, their totals and their end are the last one's."""
    changes: dict[str, object] = {"text": "".join(output.text for output in outputs)}
    for name in RequestOutput.__struct_fields__:
        parts = [part for output in outputs if isinstance(part := getattr(output, name), list)]
        if parts:
            changes[name] = [one for part in parts for one in part]
    return msgspec.structs.replace(outputs[-1], **changes)
