"""A server on a real port of this machine, in a thread, for tests that are a client from outside: a browser."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from typing import Any

from server.app import create_app
from server.context import Lifecycle
from server.engine_face import StartableEngine
from server.serve import ShutdownTimes, listen, serve
from server.settings import AppSettings


class LiveServer:
    """Runs from its construction until `stop`; `url` has no slash at its end."""

    def __init__(self, engine: StartableEngine, *, port: int = 0, **settings: Any) -> None:
        self.engine = engine
        self._listener = listen("127.0.0.1", port)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._settings = AppSettings(**{"served_names": ("fake",), **settings})
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Future[int] | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="live server")
        self._thread.start()
        assert self._ready.wait(60)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = self._loop.create_future()
        lifecycle = Lifecycle()
        app = create_app(self.engine, self._settings, lifecycle=lifecycle)
        self._ready.set()
        await serve(
            self.engine,
            app,
            lifecycle,
            self._listener,
            stop=self._stop,
            times=ShutdownTimes(timeout_s=2.0, linger_s=0.0),
            display=contextlib.nullcontext(),
        )

    def stop(self) -> None:
        """As Ctrl-C does; calling it again does nothing."""
        if self._thread.is_alive():
            assert self._loop is not None
            assert self._stop is not None
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                self._loop.call_soon_threadsafe(self._stop.set_result, signal.SIGINT)
            self._thread.join(30)
            assert not self._thread.is_alive()
