"""`lfu`: evict the expert with the fewest uses, where a use counts half after a number of passes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from cache.expert_key import ExpertKey

_HALF_LIFE = 12.0  # passes through the layers; best of 6, 11, 22 and 44 on the first halves of the traces


class LfuPolicy:
    """Decayed counts, of experts that are not resident too; among equals the least recently used goes.

    A count is kept as log2(sum over uses of 2^(pass / half-life)): its order does not change with time, so a heap
    whose stale entries are skipped will do.
    """

    def __init__(self, num_slots: int, layers: Sequence[int], num_experts: int) -> None:
        self._pass = 0
        self._last_layer = -1
        self._num_uses = 0
        self._count: dict[ExpertKey, float] = {}
        self._entry: dict[ExpertKey, tuple[float, int, ExpertKey]] = {}  # of the resident ones, as in the heap
        self._heap: list[tuple[float, int, ExpertKey]] = []

    def insert(self, key: ExpertKey) -> None:
        count, now = self._count.get(key), self._pass / _HALF_LIFE
        count = now if count is None else count + math.log2(1.0 + 2.0 ** min(now - count, 1000.0))
        self._count[key] = count
        self._num_uses += 1
        self._entry[key] = entry = (count, self._num_uses, key)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 8 * len(self._entry) + 64:
            self._heap = list(self._entry.values())
            heapq.heapify(self._heap)

    touch = insert

    def remove(self, key: ExpertKey) -> None:
        del self._entry[key]

    def victim(self, evictable: Callable[[ExpertKey], bool], *, sparing: bool = False) -> ExpertKey | None:
        pinned = []
        found = None
        while self._heap:
            entry = self._heap[0]
            if self._entry.get(entry[2]) is not entry:
                heapq.heappop(self._heap)
            elif evictable(entry[2]):
                found = entry[2]
                break
            else:
                pinned.append(heapq.heappop(self._heap))
        for entry in pinned:
            heapq.heappush(self._heap, entry)
        return found

    def will_use(self, keys: Sequence[Sequence[ExpertKey]]) -> None:
        pass

    def observe(self, layer: int, requests: Sequence[int], chosen: Sequence[Sequence[int]], is_prefill: bool) -> None:
        self._pass += layer <= self._last_layer
        self._last_layer = layer

    def ended(self, request: int) -> None:
        pass
