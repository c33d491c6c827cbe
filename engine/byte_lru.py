"""A cache bounded by the bytes of what is in it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteLru(Generic[K, V]):
    """Least recently used goes first; what alone is larger than the limit is not kept."""

    def __init__(self, max_nbytes: int) -> None:
        self._max_nbytes = max_nbytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.nbytes = 0

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        self._drop(key)
        if nbytes > self._max_nbytes:
            return
        self._entries[key] = value, nbytes
        self.nbytes += nbytes
        while self.nbytes > self._max_nbytes:
            self._drop(next(iter(self._entries)))

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, key: K) -> None:
        if key in self._entries:
            self.nbytes -= self._entries.pop(key)[1]
