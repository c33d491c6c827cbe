"""What is between the engine's face and the engine: a thread of this process, or a child process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from engine.config import EngineConfig
from engine.messages import Failed, FromEngine, ModelInfo, Stop, ToEngine
from engine.threads import wait_passively
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.convert import Progress
    from engine.engine import Engine
    from engine.service import Inbox

OnMessage = Callable[[FromEngine], None]
OnEnd = Callable[[str], None]
"""Called once with the reason, when an engine that was ready has ended though nobody stopped it."""


class EngineLink(Protocol):
    """All calls, and calls back, on one event loop."""

    @property
    def info(self) -> ModelInfo:
        """Of the loaded model."""
        ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    async def start(self) -> None:
        """Load; raises what loading raises. Cancelled, it leaves nothing behind but a thread that still loads."""
        ...

    def send(self, message: ToEngine) -> None:
        """In order; after the end it goes nowhere."""
        ...

    async def stop(self, timeout_s: float) -> None:
        """End after the running step; a process that has not by then is killed."""
        ...


class ThreadLink:
    """The engine on a thread of its own. When it fails it stays dead: its memory is this process's."""

    def __init__(
        self,
        config: EngineConfig,
        build: Callable[[EngineConfig, Progress | None], Engine] | None,
        progress: Progress | None,
        on_message: OnMessage,
        on_end: OnEnd,
    ) -> None:
        self._config = config
        self._build = build
        self._progress = progress
        self._on_message = on_message
        self._on_end = on_end
        self._inbox: Inbox | None = None
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None

    @property
    def info(self) -> ModelInfo:
        assert self._engine is not None
        return self._engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._engine is not None
        tokenizer = self._engine.tokenizer
        assert isinstance(tokenizer, Tokenizer)
        return tokenizer

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(loop, loaded), name="engine", daemon=True)
        self._thread.start()
        await loaded

    def send(self, message: ToEngine) -> None:
        assert self._inbox is not None
        self._inbox.put(message)

    async def stop(self, timeout_s: float) -> None:
        if self._inbox is not None:
            self._inbox.put(Stop())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _run(self, loop: asyncio.AbstractEventLoop, loaded: asyncio.Future[None]) -> None:
        wait_passively()
        from engine.engine import Engine
        from engine.service import EngineService, Inbox

        def settle(error: BaseException | None) -> None:
            if loaded.done():  # cancelled
                return
            if error is None:
                loaded.set_result(None)
            else:
                loaded.set_exception(error)

        try:
            self._engine = (self._build or Engine)(self._config, self._progress)
        except BaseException as error:
            loop.call_soon_threadsafe(settle, error)
            return
        self._inbox = Inbox()
        service = EngineService(
            self._engine, self._inbox, lambda message: loop.call_soon_threadsafe(self._tell, message)
        )
        loop.call_soon_threadsafe(settle, None)
        service.run()

    def _tell(self, message: FromEngine) -> None:
        if isinstance(message, Failed):
            self._on_end(message.error)
        else:
            self._on_message(message)
