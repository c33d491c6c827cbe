"""Having a running server record its routing, and keeping what it sends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import httpx
import msgspec

from engine.errors import ConfigError
from server.remote import authorization, download, end_remote, server_url

_PACKING_S = 300.0  # a server may take to compress what it recorded


class Recorded(msgspec.Struct, frozen=True):
    """What the server says of it."""

    num_tokens: int
    num_requests: int
    is_full: bool


async def record_trace(
    url: str,
    keys: Sequence[str],
    out: Path,
    *,
    seconds: float,
    domain: str = "",
    max_tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Recorded:
    """Record for so long, or until Ctrl-C, and write `out`, which is replaced only by a whole recording.

    Raises `ConfigError` if `out` cannot be written, which is known before anything is recorded, or if there was
    nothing to record, and `RemoteError`. `progress(what, done, total)` is told the seconds.
    """
    route = f"{server_url(url)}/admin/trace"
    body = {"seconds": seconds, "domain": domain, **({} if max_tokens is None else {"max_tokens": max_tokens})}
    timeout = httpx.Timeout(10.0, read=seconds + _PACKING_S)
    with _replacing(out) as file:
        async with (
            httpx.AsyncClient(headers=authorization(keys), timeout=timeout) as client,
            _ended_by_interrupt(client, route),
            _ticking(progress, seconds),
        ):
            headers = await download(client, route, body, file)
        recorded = Recorded(
            int(headers.get("x-foregate-tokens", 0)),
            int(headers.get("x-foregate-requests", 0)),
            headers.get("x-foregate-full") == "true",
        )
        if not recorded.num_tokens:
            raise ConfigError(f"{server_url(url)} computed no tokens meanwhile: there is nothing to keep")
    return recorded


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[BinaryIO]:
    """A file beside `out` that becomes it at the end, and is gone if there is an error. Raises `ConfigError`."""
    part = out.with_name(out.name + ".part")
    try:
        if out.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        if out.suffix != ".npz":
            raise ValueError("name it with .npz, by which traces are found")
        out.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("wb")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write routing trace {out}: {getattr(error, 'strerror', None) or error}") from error
    try:
        with file:
            yield file
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _ended_by_interrupt(client: httpx.AsyncClient, route: str) -> AsyncIterator[None]:
    """The first Ctrl-C ends the recording, which is then answered; the second one ends this program."""
    loop = asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        ending.append(loop.create_task(end_remote(client, route)))

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread, or not on Unix
        loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGINT)
        await asyncio.gather(*ending, return_exceptions=True)


@contextlib.asynccontextmanager
async def _ticking(progress: Callable[[str, int, int], None] | None, seconds: float) -> AsyncIterator[None]:
    """Tell `progress` each second."""

    async def tick() -> None:
        started = time.monotonic()
        while progress is not None and (done := time.monotonic() - started) < seconds:
            progress("recording, seconds", int(done), round(seconds))
            await asyncio.sleep(1.0)

    ticking = asyncio.ensure_future(tick())
    try:
        yield
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
