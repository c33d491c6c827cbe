"""The last minutes of a server's counters, one row a second, so that a page that is opened now shows them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.messages import EngineStats

INTERVAL_S = 1.0
_KEEP = 600  # rows: ten minutes


COLUMNS: dict[str, Callable[[EngineStats], float]] = {
    "running": lambda stats: stats.num_running,
    "waiting": lambda stats: stats.num_waiting,
    "kv_blocks": lambda stats: stats.kv_blocks,
    "kv_blocks_used": lambda stats: stats.kv_blocks_used,
    "prompt_tokens": lambda stats: stats.computed_prompt_tokens_total,
    "output_tokens": lambda stats: stats.output_tokens_total,
    "steps": lambda stats: stats.steps_total,
    "step_s": lambda stats: stats.step_seconds_total,
    "decode_queries": lambda stats: stats.expert_cache.decode.queries,
    "decode_hits": lambda stats: stats.expert_cache.decode.hits,
    "prefill_queries": lambda stats: stats.expert_cache.prefill.queries,
    "prefill_hits": lambda stats: stats.expert_cache.prefill.hits,
    "stall_s": lambda stats: stats.expert_cache.decode.stall_s + stats.expert_cache.prefill.stall_s,
    "fetched_bytes": lambda stats: stats.expert_cache.fetched_nbytes,
    "fetched_ahead_bytes": lambda stats: stats.expert_cache.fetched_ahead_nbytes,
    "bandwidth": lambda stats: stats.expert_cache.bandwidth,
    "evictions": lambda stats: stats.expert_cache.evictions,
    "slots_used": lambda stats: stats.expert_cache.num_slots_used,
    "prefetch_used": lambda stats: sum(of.useful for of in stats.expert_cache.prefetch.values()),
    "prefetch_late": lambda stats: sum(of.late for of in stats.expert_cache.prefetch.values()),
    "prefetch_wasted": lambda stats: sum(of.wasted for of in stats.expert_cache.prefetch.values()),
    "prefetch_cancelled": lambda stats: sum(of.cancelled for of in stats.expert_cache.prefetch.values()),
}
"""What a row has after its time: gauges, and counters since the engine's start."""


@dataclass(frozen=True, slots=True)
class Row:
    seq: int
    values: list[float]  # time in seconds, then COLUMNS


class History:
    """`run` adds a row a second; where nothing runs it, whoever looks does. All calls from one event loop."""

    def __init__(self, stats: Callable[[], EngineStats], clock: Callable[[], float]) -> None:
        self._stats = stats
        self._clock = clock
        self._rows: deque[Row] = deque(maxlen=_KEEP)
        self._num_rows = 0
        self._next_s = 0.0

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            if self._clock() >= self._next_s:  # else somebody's look was quicker
                self._add()
            await asyncio.sleep(max(0.0, self._next_s - self._clock()))

    def since(self, seq: int) -> list[Row]:
        """The rows after that one."""
        if not self._rows or self._clock() >= self._next_s:
            self._add()
        return [row for row in self._rows if row.seq > seq]

    def _add(self) -> None:
        now_s = self._clock()
        stats = self._stats()
        self._num_rows += 1
        values: list[Any] = [round(now_s, 3), *(column(stats) for column in COLUMNS.values())]
        self._rows.append(Row(self._num_rows, values))
        self._next_s = now_s + INTERVAL_S
