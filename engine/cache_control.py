"""What an operator may do to the caches of the running engine. What goes to it and comes back are messages."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from engine.block_manager import BlockManager
from engine.errors import EngineDead, InvalidRequest
from engine.messages import CacheAction, CacheControlled, ControlCache

if TYPE_CHECKING:
    from engine.engine import Engine


class CacheControls:
    """The asking side. All calls from one event loop."""

    def __init__(self, send: Callable[[ControlCache], None]) -> None:
        self._send = send
        self._answers: dict[str, asyncio.Future[CacheControlled]] = {}

    async def ask(self, action: CacheAction, experts: Sequence[tuple[int, int]] | None = None) -> int:
        """How many experts it was done to. Raises `InvalidRequest` for experts that cannot be, and `EngineDead`."""
        asked = ControlCache(uuid.uuid4().hex, action, None if experts is None else list(experts))
        self._answers[asked.ask_id] = asyncio.get_running_loop().create_future()
        self._send(asked)
        try:
            answer = await self._answers[asked.ask_id]
        finally:
            del self._answers[asked.ask_id]
        if answer.error is not None:
            raise InvalidRequest(answer.error, param="experts")
        return answer.num_experts

    def deliver(self, answer: CacheControlled) -> None:
        """What the engine answers; to nobody, if that was cancelled meanwhile."""
        waiting = self._answers.get(answer.ask_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def fail(self, error: str) -> None:
        """The engine will not answer any more."""
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(EngineDead(error))


def control_cache(engine: Engine, asked: ControlCache) -> CacheControlled:
    """The answering side, on the engine's thread, between two steps."""
    try:
        return CacheControlled(asked.ask_id, engine.control_cache(asked.action, asked.experts))
    except ValueError as problem:
        return CacheControlled(asked.ask_id, error=str(problem))


def control(
    action: CacheAction, experts: Sequence[tuple[int, int]] | None, blocks: BlockManager, cache: ExpertCache | None
) -> int:
    """How many experts it was done to; see `AsyncEngine.control_cache`. Raises `ValueError`."""
    if action == "reset":
        blocks.reset_prefix_cache()
        return 0 if cache is None else cache.reset()
    if cache is None:
        raise ValueError("this model has no experts")
    keys = _expert_keys(experts, cache.keys)
    if action == "pin":
        cache.keep(keys)
    return cache.warm(keys)


def _expert_keys(experts: Sequence[tuple[int, int]] | None, known: Sequence[ExpertKey]) -> list[ExpertKey]:
    """None: all there are. Raises `ValueError` for one that there is not."""
    if experts is None:
        return list(known)
    keys = [ExpertKey(layer, expert) for layer, expert in experts]
    unknown = set(keys) - set(known)
    if unknown:
        one = min(unknown)
        raise ValueError(f"there is no expert {one.expert} of layer {one.layer}")
    return keys
