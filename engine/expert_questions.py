"""The asking side of what is known of each expert, on the event loop. What goes to the engine and back are messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cache.expert_table import ExpertTable
from engine.errors import EngineDead
from engine.messages import AskExperts, ExpertsTold


class ExpertQuestions:
    """One question at a time: whoever asks meanwhile gets the same answer. All calls from one event loop."""

    def __init__(self, send: Callable[[AskExperts], None]) -> None:
        self._send = send
        self._num_asked = 0
        self._answer: asyncio.Future[ExpertTable | None] | None = None  # of the question that is open

    async def ask(self) -> ExpertTable | None:
        """None: there are no experts. Raises `EngineDead` if the engine ends before it answers."""
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
            self._num_asked += 1
            self._send(AskExperts(self._num_asked))
        return await asyncio.shield(self._answer)  # one who leaves takes it from nobody

    def deliver(self, told: ExpertsTold) -> None:
        """What the engine answers; ignored if that question was given up meanwhile."""
        if self._answer is not None and told.ask_id == self._num_asked:
            self._answer.set_result(told.table)
            self._answer = None

    def fail(self, error: str) -> None:
        """The engine will not answer any more."""
        if self._answer is not None:
            self._answer.set_exception(EngineDead(error))
            self._answer.exception()  # seen, even if nobody waits any more
            self._answer = None
