"""Asking the running engine whether its books add up. What goes to it and comes back are messages."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.errors import EngineDead
from engine.messages import CheckIntegrity, IntegrityChecked

if TYPE_CHECKING:
    from engine.engine import Engine


class LiveChecks:
    """The asking side. All calls from one event loop."""

    def __init__(self, send: Callable[[CheckIntegrity], None]) -> None:
        self._send = send
        self._answers: dict[str, asyncio.Future[str | None]] = {}

    async def ask(self) -> str | None:
        """What is wrong, or None; raises `EngineDead` if the engine dies meanwhile."""
        asked = CheckIntegrity(uuid.uuid4().hex)
        self._answers[asked.check_id] = asyncio.get_running_loop().create_future()
        self._send(asked)
        try:
            return await self._answers[asked.check_id]
        finally:
            del self._answers[asked.check_id]

    def deliver(self, checked: IntegrityChecked) -> None:
        """What the engine answers; to nobody, if that was cancelled meanwhile."""
        answer = self._answers.get(checked.check_id)
        if answer is not None and not answer.done():
            answer.set_result(checked.error)

    def fail(self, error: str) -> None:
        """The engine will not answer any more."""
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineDead(error))


def check_engine(engine: Engine, asked: CheckIntegrity) -> IntegrityChecked:
    """The answering side, on the engine's thread, between two steps."""
    try:
        engine.check_integrity()
    except AssertionError as problem:
        return IntegrityChecked(asked.check_id, str(problem))
    return IntegrityChecked(asked.check_id)
