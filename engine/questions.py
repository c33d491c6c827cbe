"""Questions to the running engine, each of which has its own answer. What goes to it and comes back are messages."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from engine.errors import EngineDead


class Answer(Protocol):
    """To the question of that id."""

    @property
    def ask_id(self) -> str: ...


QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT", bound=Answer)


class Questions(Generic[QuestionT, AnswerT]):
    """The asking side. All calls from one event loop."""

    def __init__(self, send: Callable[[QuestionT], None]) -> None:
        self._send = send
        self._answers: dict[str, asyncio.Future[AnswerT]] = {}

    async def ask(self, question: Callable[[str], QuestionT]) -> AnswerT:
        """`question` is given its id. Raises `EngineDead` if the engine ends before it answers."""
        ask_id = uuid.uuid4().hex
        self._answers[ask_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(question(ask_id))
            return await self._answers[ask_id]
        finally:
            del self._answers[ask_id]

    def deliver(self, answer: AnswerT) -> None:
        """What the engine answers; to nobody, if that was cancelled meanwhile."""
        waiting = self._answers.get(answer.ask_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def fail(self, error: str) -> None:
        """The engine will not answer any more."""
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(EngineDead(error))
