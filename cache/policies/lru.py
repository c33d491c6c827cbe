"""`lru`: evict the least recently used expert."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from cache.expert_key import ExpertKey


class LruPolicy:
    """Recency order in a linked hash map; pinned experts are skipped where they stand."""

    def __init__(self, num_slots: int, layers: Sequence[int], num_experts: int) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()  # oldest first

    def insert(self, key: ExpertKey) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def touch(self, key: ExpertKey) -> None:
        self._order.move_to_end(key)

    def remove(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, evictable: Callable[[ExpertKey], bool], *, sparing: bool = False) -> ExpertKey | None:
        return next((key for key in self._order if evictable(key)), None)

    def will_use(self, keys: Sequence[Sequence[ExpertKey]]) -> None:
        pass

    def observe(self, layer: int, requests: Sequence[int], chosen: Sequence[Sequence[int]], is_prefill: bool) -> None:
        pass

    def ended(self, request: int) -> None:
        pass
