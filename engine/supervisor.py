"""Keeps an engine behind a link: starts it, knows what state it is in, and starts it again when it has died."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from engine.errors import EngineDead
from engine.link import EngineLink
from engine.messages import EngineState, ModelInfo, ToEngine
from engine.process_link import ProcessLink
from engine.restarts import Restarts
from engine.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

STOP_S = 1.0  # for the running step to end, when there was no time left for requests


class Supervisor:
    """All calls from one event loop."""

    def __init__(self, make_link: Callable[[], EngineLink], restarts: Restarts, on_death: Callable[[], None]) -> None:
        """`on_death`: the engine will answer none of those who wait for it."""
        self._make_link = make_link
        self._restarts = restarts
        self._on_death = on_death
        self._restarting: asyncio.Task[None] | None = None
        self._info: ModelInfo | None = None
        self.link: EngineLink | None = None
        self.state: EngineState = "stopped"
        self.error: str | None = None  # why it is dead or restarting
        self.num_restarts = 0

    @property
    def info(self) -> ModelInfo:
        """The loaded model; raises `EngineDead` before `start` has returned."""
        if self._info is None:
            raise self._dead()
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the loaded model; raises `EngineDead` as `info`."""
        if self.link is None:
            raise self._dead()
        return self.link.tokenizer

    def require_ready(self) -> None:
        """Raise `EngineDead` in every other state."""
        if self.state != "ready":
            raise self._dead()

    def send(self, message: ToEngine) -> None:
        """To nobody, if there is no engine."""
        if self.link is not None:
            self.link.send(message)

    async def start(self) -> None:
        """Load the model; raises what that raises."""
        self.state = "loading"
        link = self._make_link()
        try:
            await link.start()
        except Exception as error:
            self.state, self.error = "dead", str(error)
            raise
        self.link, self._info, self.state = link, link.info, "ready"

    async def drain(self) -> None:
        """It takes no more requests, and is not started again from now on."""
        await cancelled(self._restarting)
        if self.state in ("ready", "restarting"):
            self.state = "draining"

    async def stop(self, timeout_s: float) -> None:
        """End the engine, which was started."""
        assert self.link is not None
        await self.link.stop(timeout_s)
        self.link = self._info = None
        if self.state != "dead":
            self.state = "stopped"

    def kill(self) -> None:
        """It hangs: a process of its own is ended, and has died then; a thread cannot be."""
        if isinstance(self.link, ProcessLink):
            self.link.kill()

    def ended(self, why: str) -> None:
        """The link's to tell: the engine has failed or died by itself."""
        self.error = why
        dead = self.link if self.state == "ready" and isinstance(self.link, ProcessLink) else None
        self.state = "dead" if dead is None else "restarting"
        self._on_death()
        if dead is not None:
            self._restarting = asyncio.ensure_future(self._restart(dead))

    async def _restart(self, dead: ProcessLink) -> None:
        """Until it serves again, or has died too often."""
        await dead.stop(STOP_S)
        while (delay_s := self._restarts.delay_after_death()) is not None:
            _log.warning("the engine is started again in %g s", delay_s)
            await asyncio.sleep(delay_s)
            began = time.monotonic()
            link = dead.again()
            try:
                await link.start()
            except Exception as error:
                self.error = str(error)
                _log.error("the engine could not be started again: %s", error)
                continue
            self.link, self._info, self.error = link, link.info, None
            self.state = "ready"
            self.num_restarts += 1
            _log.warning("the engine serves again after %.1f s", time.monotonic() - began)
            return
        self.state = "dead"
        _log.error("the engine has died too often and is not started again")

    def _dead(self) -> EngineDead:
        return EngineDead(f"the engine is {self.state}" + (f": {self.error}" if self.error else ""))


async def cancelled(task: asyncio.Task[None] | None) -> None:
    """Wait until it has ended, soon."""
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
