"""Requests that cost the machine next to nothing: one connection each, the bytes made beforehand, answers not parsed.

For loads far above what a server can do, from the machine that it runs on: a full client would take the processor from
the server, and what it measured would be its own queue.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit


class LightClient:
    """Of a server at `url`, http only."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"a URL that begins with http:// is needed, not {url!r}")
        self._host, self._port = parts.hostname, parts.port or 80

    def request(self, path: str, body: dict[str, Any]) -> bytes:
        """A POST of that JSON, to be sent with `exchange`."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content

    async def exchange(self, request: bytes) -> Exchange:
        """Send a request; its answer is then read by `Exchange`. Raises `OSError`."""
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(self._host, self._port)
        writer.write(request)
        await writer.drain()
        return Exchange(reader, writer, began)


class Exchange:
    """One request that has been sent, at `began` (of `time.perf_counter`)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, began: float) -> None:
        self.began = began
        self._reader = reader
        self._writer = writer

    async def status(self) -> int:
        """Raises `ConnectionError` if the server hangs up instead."""
        line = await self._reader.readline()
        if not line:
            raise ConnectionError("the server hung up")
        return int(line.split(b" ", 2)[1])

    async def pieces(self) -> AsyncIterator[bytes]:
        """What follows the status, as it comes."""
        while piece := await self._reader.read(65536):
            yield piece

    def close(self) -> None:
        """Hang up."""
        self._writer.close()
