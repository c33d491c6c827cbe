"""Running the application on a socket: listens at once, loads the engine, and goes away in good order on a signal."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from engine.errors import ConfigError
from server.context import Lifecycle
from server.engine_face import StartableEngine
from server.http_protocol import HttpProtocol

_log = logging.getLogger("foregate.server")

_CANCEL_S = 1.0  # for a process that loads to be gone
_UNREAD_S = 0.3  # beyond the timeout, for answers to be read
_ASKED_ALL_THE_TIME = frozenset({"/live", "/ready", "/health", "/metrics", "/dashboard/data", "/v1/experts/stats"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownTimes:
    """After SIGTERM: `linger_s` still listening but not ready, `timeout_s` in all until what runs is cut."""

    timeout_s: float = 30.0
    linger_s: float = 5.0  # for load balancers to notice; SIGINT does not linger

    def linger_after(self, signum: int) -> float:
        return min(self.linger_s, self.timeout_s) if signum == signal.SIGTERM else 0.0


class _Server(uvicorn.Server):
    """uvicorn's, with signals left to us: its own handling re-raises them before the engine has stopped."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises `ConfigError` with the cure."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as exc:
        raise ConfigError(f"cannot listen on {host}: {exc.strerror or exc}; choose another --host") from exc
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as exc:
        listener.close()
        reason = getattr(exc, "strerror", None) or exc
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from exc
    listener.setblocking(False)
    return listener


async def serve(
    engine: StartableEngine,
    app: ASGIApp,
    lifecycle: Lifecycle,
    listener: socket.socket,
    *,
    stop: asyncio.Future[Any],
    times: ShutdownTimes,
    display: AbstractContextManager[Any],
) -> bool:
    """Serve until `stop` has a signal number; False: that came before the engine was loaded.

    Raises what loading raises. `display` is entered while the engine loads.
    """
    server = _Server(_config(app))
    serving: asyncio.Future[Any] = asyncio.ensure_future(server.serve(sockets=[listener]))
    loading: asyncio.Future[Any] = asyncio.ensure_future(engine.start())
    try:
        with display:
            await asyncio.wait([serving, loading, stop], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            await asyncio.wait({loading}, timeout=_CANCEL_S)
            return False
        loading.result()
        lifecycle.loaded()
        host, port = listener.getsockname()[:2]
        _log.info("ready: http://%s:%d/v1 serves %s", f"[{host}]" if ":" in host else host, port, engine.info.name)
        await asyncio.wait([serving, stop], return_when=asyncio.FIRST_COMPLETED)
        lifecycle.draining = lifecycle.stopping = True
        if stop.done():
            await _drain(engine, server, serving, times, stop.result())
        return True
    finally:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)


async def _drain(
    engine: StartableEngine, server: uvicorn.Server, serving: asyncio.Future[Any], times: ShutdownTimes, signum: int
) -> None:
    deadline = time.monotonic() + times.timeout_s
    linger_s = times.linger_after(signum)
    _log.info("shutting down: not ready any more, running requests have %g s", times.timeout_s)
    await asyncio.wait({serving}, timeout=linger_s)
    server.should_exit = True
    await engine.stop(drain_s=times.timeout_s - linger_s)
    # every request has its answer by now; who does not read it is hung up on
    await asyncio.wait({serving}, timeout=max(0.0, deadline - time.monotonic()) + _UNREAD_S)
    for connection in list(server.server_state.connections):
        if connection.transport is not None:
            connection.transport.abort()
    await asyncio.wait({serving}, timeout=_UNREAD_S)
    server.force_exit = True
    await asyncio.wait({serving})


class _AskedAllTheTime(logging.Filter):
    """What probes, scrapers and an open dashboard ask for, every few seconds, is for DEBUG as long as all is well."""

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args if isinstance(record.args, tuple) and len(record.args) == 5 else (None,) * 5
        if args[4] == 200 and str(args[2]).partition("?")[0] in _ASKED_ALL_THE_TIME:
            record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger(record.name).isEnabledFor(record.levelno)


class Refusals(logging.Filter):
    """Of refusals by the hundred, as under overload, one line in some seconds is logged, and how many there were."""

    def __init__(self, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._every_s = every_s
        self._clock = clock
        self._last_s = -math.inf
        self._num_left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        if not isinstance(args, tuple) or len(args) != 5 or args[4] != 503:
            return True
        now_s = self._clock()
        if now_s - self._last_s < self._every_s:
            self._num_left_out += 1
            return False
        if self._num_left_out:
            record.msg = f"{record.msg}, and {self._num_left_out} more since the last that is told"
        self._last_s, self._num_left_out = now_s, 0
        return True


def _config(app: ASGIApp) -> uvicorn.Config:
    logging.getLogger("uvicorn.access").filters[:] = [_AskedAllTheTime(), Refusals()]
    return uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        http=HttpProtocol,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,  # above the usual 60 s of proxies, so that they close first
        timeout_graceful_shutdown=None,  # `_drain` sees to that
    )


def run(
    engine: StartableEngine,
    app: ASGIApp,
    lifecycle: Lifecycle,
    listener: socket.socket,
    *,
    times: ShutdownTimes,
    display: AbstractContextManager[Any],
) -> None:
    """`serve` until SIGTERM or SIGINT; a second signal ends the process at once."""

    async def until_signal() -> int | None:
        loop = asyncio.get_running_loop()
        stop: asyncio.Future[int] = loop.create_future()
        with _first_signal_into(stop, loop):
            loaded = await serve(engine, app, lifecycle, listener, stop=stop, times=times, display=display)
            return None if loaded else _exit_now(stop.result())

    asyncio.run(until_signal())


@contextmanager
def _first_signal_into(stop: asyncio.Future[int], loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    seen: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if seen:
            _exit_now(signum)
        seen.append(signum)
        loop.call_soon_threadsafe(stop.set_result, signum)

    # not loop.add_signal_handler: the second signal must work when the loop is stuck
    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _exit_now(signum: int) -> int:
    """Without waiting for anything: a thread that loads a model cannot be interrupted."""
    os._exit(128 + signum)
