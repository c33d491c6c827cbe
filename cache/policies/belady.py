"""`belady`: evict the expert whose next use is farthest away. Knows the future, so it is for replay only."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

from cache.expert_key import ExpertKey

_NEVER = 1 << 62


class BeladyPolicy:
    """The most hits that any policy without prefetch can have, if the experts of each layer call fit in the slots."""

    def __init__(self, num_slots: int, layers: Sequence[int], num_experts: int) -> None:
        self._uses: Mapping[ExpertKey, Sequence[int]] = {}
        self._position: dict[ExpertKey, int] = {}  # uses that are past
        self._now = -1
        self._next: dict[ExpertKey, int] = {}  # of the resident ones
        self._heap: list[tuple[int, ExpertKey]] = []

    def foresee(self, uses: Mapping[ExpertKey, Sequence[int]]) -> None:
        """`uses[key]`: the layer calls, counted from 0 as they are observed, that use it, ascending."""
        self._uses = uses

    def insert(self, key: ExpertKey) -> None:
        uses, i = self._uses.get(key, ()), self._position.get(key, 0)
        while i < len(uses) and uses[i] <= self._now:
            i += 1
        self._position[key] = i
        self._next[key] = following = uses[i] if i < len(uses) else _NEVER
        heapq.heappush(self._heap, (-following, key))

    touch = insert

    def remove(self, key: ExpertKey) -> None:
        del self._next[key]

    def victim(self, evictable: Callable[[ExpertKey], bool], *, sparing: bool = False) -> ExpertKey | None:
        pinned = []
        found = None
        while self._heap:
            following, key = self._heap[0]
            if self._next.get(key) != -following:
                heapq.heappop(self._heap)
            elif evictable(key):
                found = key
                break
            else:
                pinned.append(heapq.heappop(self._heap))
        for entry in pinned:
            heapq.heappush(self._heap, entry)
        return found

    def will_use(self, keys: Sequence[Sequence[ExpertKey]]) -> None:
        pass

    def observe(self, layer: int, requests: Sequence[int], chosen: Sequence[Sequence[int]], is_prefill: bool) -> None:
        self._now += 1

    def ended(self, request: int) -> None:
        pass
