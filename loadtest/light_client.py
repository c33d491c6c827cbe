"""Requests that cost the machine next to nothing: connections used again, bytes made beforehand, answers not parsed.

For loads far above what a server can do, from the machine that it runs on: a full client would take the processor from
the server, and what it measured would be its own queue.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_IDLE_S = 2.0  # servers hang up what is idle for longer: uvicorn after 5 s


class LightClient:
    """Of a server at `url`, http only."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"a URL that begins with http:// is needed, not {url!r}")
        self._host, self._port = parts.hostname, parts.port or 80
        self._idle: list[_Connection] = []

    def request(self, path: str, body: dict[str, Any]) -> bytes:
        """A POST of that JSON, to be sent with `exchange`."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    async def exchange(self, request: bytes) -> Exchange:
        """Send a request; its answer is then read by `Exchange`. Raises `OSError`."""
        began = time.perf_counter()
        while self._idle and began - self._idle[0].idle_since > _IDLE_S:
            self._idle.pop(0).writer.close()
        connection = self._idle.pop() if self._idle else await self._connect()
        connection.writer.write(request)
        await connection.writer.drain()
        return Exchange(connection, began, self._idle)

    async def close(self) -> None:
        """Hang up what is idle."""
        for connection in self._idle:
            connection.writer.close()
        await asyncio.gather(*(one.writer.wait_closed() for one in self._idle), return_exceptions=True)
        self._idle.clear()

    async def _connect(self) -> _Connection:
        return _Connection(*await asyncio.open_connection(self._host, self._port))


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float = 0.0


class Exchange:
    """One request that has been sent, at `began` (of `time.perf_counter`)."""

    def __init__(self, connection: _Connection, began: float, idle: list[_Connection]) -> None:
        self.began = began
        self._connection: _Connection | None = connection
        self._reader = connection.reader
        self._idle = idle

    async def status(self) -> int:
        """Raises `ConnectionError` if the server hangs up instead."""
        line = await self._reader.readline()
        if not line:
            raise ConnectionError("the server hung up")
        return int(line.split(b" ", 2)[1])

    async def pieces(self) -> AsyncIterator[bytes]:
        """What follows the status of a stream, as it comes, to its last chunk or until the server hangs up."""
        end = b""
        while piece := await self._reader.read(65536):
            yield piece
            end = (end + piece)[-5:]
            if end == b"0\r\n\r\n":
                self._reuse()
                return

    async def skip(self) -> None:
        """What follows the status of an answer of known length. Raises `ConnectionError` if the server hangs up."""
        num_bytes = 0
        while (line := await self._reader.readline()) != b"\r\n":
            if not line:
                raise ConnectionError("the server hung up")
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                num_bytes = int(value)
        await self._reader.readexactly(num_bytes)
        self._reuse()

    def close(self) -> None:
        """Hang up, unless all has been read."""
        if self._connection is not None:
            self._connection.writer.close()
            self._connection = None

    def _reuse(self) -> None:
        if self._connection is not None:
            self._connection.idle_since = time.perf_counter()
            self._idle.append(self._connection)
            self._connection = None
