"""`least_stale`: evict what this pass through the layers has passed by unused, then what is farthest in the cycle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from cache.expert_key import ExpertKey


class LeastStalePolicy:
    """An expert is stale if its layer has run in the present pass without it.

    Stale ones go first, then all others; both in the order of the layer cycle, the layer that has just run being the
    farthest away, and within a layer the least recently used first. A decision looks at one expert a layer.
    """

    def __init__(self, num_slots: int, layers: Sequence[int], num_experts: int) -> None:
        self._idx = {layer: i for i, layer in enumerate(layers)}
        self._orders: list[OrderedDict[ExpertKey, int]] = [OrderedDict() for _ in layers]  # key -> pass of its last use
        self._pass = 0
        self._current = 0

    def insert(self, key: ExpertKey) -> None:
        order = self._orders[self._idx[key.layer]]
        order[key] = self._pass
        order.move_to_end(key)

    touch = insert

    def remove(self, key: ExpertKey) -> None:
        del self._orders[self._idx[key.layer]][key]

    def victim(self, evictable: Callable[[ExpertKey], bool], *, sparing: bool = False) -> ExpertKey | None:
        for i in range(self._current, -1, -1):
            for key, used in self._orders[i].items():
                if used == self._pass:
                    break
                if evictable(key):
                    return key
        for i in range(self._current, self._current - len(self._orders), -1):
            for key in self._orders[i]:  # a negative index: the layers that are still to come, the last one first
                if evictable(key):
                    return key
        return None

    def will_use(self, keys: Sequence[Sequence[ExpertKey]]) -> None:
        pass

    def observe(self, layer: int, requests: Sequence[int], chosen: Sequence[Sequence[int]], is_prefill: bool) -> None:
        i = self._idx[layer]
        self._pass += i <= self._current
        self._current = i

    def ended(self, request: int) -> None:
        pass
