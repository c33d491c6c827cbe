"""The tier between disk and top: records in RAM, verified once, the least recently used given up first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError, ExpertStore
from cache.slot_pool import SlotPool
from cache.stats import Link

_SPARE = 16  # slots beyond the budget's for what comes down before what it makes room for has gone up


class HostTier:
    """Answers reads from its slots, else from the store. Thread-safe.

    Inclusive: what is read from disk stays here too. Exclusive: a record that goes up leaves its slot, and one that is
    evicted above comes back by `demote`, so that both tiers together hold as much as they can.
    """

    def __init__(self, store: ExpertStore, num_slots: int, *, exclusive: bool = False) -> None:
        self._store = store
        self._pool = SlotPool(num_slots + (_SPARE if exclusive else 0), store.record_nbytes)
        self._exclusive = exclusive
        self._slots: OrderedDict[ExpertKey, int] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()  # held while a record is copied: copies share one memory bus anyway
        self.num_slots = num_slots
        self.num_hits = 0

    @property
    def record_nbytes(self) -> int:
        return self._store.record_nbytes

    @property
    def num_used(self) -> int:
        return len(self._slots)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._slots

    def keys(self) -> list[ExpertKey]:
        """The experts that are here now."""
        with self._lock:
            return list(self._slots)

    def position(self, key: ExpertKey) -> int:
        return self._store.position(key)

    def link(self, key: ExpertKey) -> Link:
        """Where from it would be read now."""
        return "host" if key in self else "disk"

    def read_run(self, keys: Sequence[ExpertKey], buffers: Sequence[memoryview]) -> list[ExpertReadError | None]:
        """As `ExpertStore.read_run`; what lies here was verified when it came, and is not read again."""
        errors: list[ExpertReadError | None] = [None] * len(keys)
        missing = [i for i, key in enumerate(keys) if not self._read_here(key, buffers[i])]
        if len(missing) == len(keys):
            errors = self._store.read_run(keys, buffers)
        else:
            for i in missing:
                (errors[i],) = self._store.read_run([keys[i]], [buffers[i]])
        for i in missing:
            if errors[i] is None and not self._exclusive:
                self._put(keys[i], buffers[i])
        with self._lock:
            while len(self._slots) > self.num_slots:
                self._pool.give(self._slots.popitem(last=False)[1])
        return errors

    def demote(self, key: ExpertKey, record: memoryview) -> None:
        """A verified record was evicted above; where tiers are exclusive it stays here."""
        if self._exclusive:
            self._put(key, record)

    def _read_here(self, key: ExpertKey, buffer: memoryview) -> bool:
        with self._lock:
            slot = self._slots.get(key)
            if slot is None:
                return False
            self.num_hits += 1
            buffer[: self.record_nbytes] = self._pool.buffer(slot)
            if self._exclusive:
                del self._slots[key]
                self._pool.give(slot)
            else:
                self._slots.move_to_end(key)
            return True

    def _put(self, key: ExpertKey, record: memoryview) -> None:
        with self._lock:
            if key in self._slots:
                return
            slot = self._pool.take()
            if slot is None:
                _, slot = self._slots.popitem(last=False)
            self._slots[key] = slot
            self._pool.buffer(slot)[:] = record[: self.record_nbytes]
