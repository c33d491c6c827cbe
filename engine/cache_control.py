"""What an operator may do to the caches of the running engine. What it is told and answers are messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from engine.block_manager import BlockManager
from engine.messages import CacheAction, CacheControlled, ControlCache

if TYPE_CHECKING:
    from engine.engine import Engine


def control_cache(engine: Engine, asked: ControlCache) -> CacheControlled:
    """The answer, on the engine's thread, between two steps."""
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
