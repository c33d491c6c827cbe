"""Records in pinned host memory, between disk and a device: read and verified there, copied up from where they lie."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError, ExpertStore


class _Record:
    __slots__ = ("holds", "is_ready", "slot")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.holds = 1
        self.is_ready = False


class PinnedTier:
    """Keeps as many records as it has slots, the least recently used given up first. Thread-safe.

    Who is handed a record holds it until `let_go`: it stays, since a copy out of it may not have run. Exclusive: a
    record that went up leaves, and one that is evicted above comes back by `take_back`.
    """

    def __init__(
        self,
        store: ExpertStore,
        num_slots: int,
        pinned: Callable[[int], memoryview],
        *,
        exclusive: bool = False,
    ) -> None:
        """`num_slots` are for what is kept and for what passes through: at least what is held at a time."""
        if num_slots < 1:
            raise ValueError("a pinned tier needs at least one slot")
        self._store = store
        self._memory = pinned(num_slots * store.record_nbytes)
        self._free = list(range(num_slots - 1, -1, -1))
        self._records: OrderedDict[ExpertKey, _Record] = OrderedDict()  # least recently used first
        self._changed = threading.Condition()
        self.exclusive = exclusive
        self.num_slots = num_slots
        self.num_hits = 0

    @property
    def record_nbytes(self) -> int:
        return self._store.record_nbytes

    @property
    def num_used(self) -> int:
        return len(self._records)

    def __contains__(self, key: ExpertKey) -> bool:
        record = self._records.get(key)
        return record is not None and record.is_ready

    def keys(self) -> list[ExpertKey]:
        """The experts that are here now."""
        with self._changed:
            return [key for key, record in self._records.items() if record.is_ready]

    def position(self, key: ExpertKey) -> int:
        return self._store.position(key)

    def hold(self, key: ExpertKey) -> memoryview | None:
        """The record, held, if it is here."""
        with self._changed:
            record = self._records.get(key)
            if record is None or not record.is_ready:
                return None
            return self._held(key, record)

    def fetch(self, keys: Sequence[ExpertKey]) -> list[memoryview | ExpertReadError]:
        """Each record, held, from here or else from disk, or what is wrong with it. `keys`: neighbours, ascending."""
        missing: list[ExpertKey] = []
        with self._changed:
            for key in keys:
                while not self._reserve(key) and not self._records[key].is_ready:
                    self._changed.wait()
                if (record := self._records[key]).is_ready:
                    self.num_hits += 1
                    self._held(key, record)
                else:
                    missing.append(key)
        errors = self._read(keys, missing)
        with self._changed:
            for key in missing:
                if key in errors:
                    self._drop(key)
                else:
                    self._records[key].is_ready = True
            self._changed.notify_all()
            return [errors.get(key) or self._view(self._records[key].slot) for key in keys]

    def let_go(self, key: ExpertKey, *, went_up: bool = False) -> None:
        """One who held it needs it no more. `went_up`: it has been copied to the tier above."""
        with self._changed:
            record = self._records[key]
            record.holds -= 1
            if went_up and self.exclusive and not record.holds:
                self._drop(key)
            self._changed.notify_all()

    def take_back(self, key: ExpertKey, copy: Callable[[memoryview], None]) -> None:
        """A verified record is evicted above: `copy` fills the slot that it is given. Nothing if it is here."""
        with self._changed:
            if not self._reserve(key):
                return
            record = self._records[key]
        is_copied = False
        try:
            copy(self._view(record.slot))
            is_copied = True
        finally:
            with self._changed:
                record.is_ready = is_copied
                record.holds -= 1
                if not is_copied:
                    self._drop(key)
                self._changed.notify_all()

    def check_integrity(self) -> None:
        """Raise `AssertionError` if slots do not add up or something is still held. Only while nothing is moved."""
        with self._changed:
            used = [record.slot for record in self._records.values()]
            if sorted([*used, *self._free]) != list(range(self.num_slots)):
                raise AssertionError("a slot of the pinned tier is lost or used twice")
            if any(record.holds or not record.is_ready for record in self._records.values()):
                raise AssertionError("a record of the pinned tier is still held")

    def _held(self, key: ExpertKey, record: _Record) -> memoryview:
        record.holds += 1
        self._records.move_to_end(key)
        return self._view(record.slot)

    def _reserve(self, key: ExpertKey) -> bool:
        """Give a record that is not here a slot, held, once there is one; -> whether that was done."""
        while key not in self._records:
            if self._free:
                self._records[key] = _Record(self._free.pop())
                return True
            unheld = next((other for other, record in self._records.items() if not record.holds), None)
            if unheld is not None:
                self._drop(unheld)
            else:
                self._changed.wait()  # another thread may bring the same record meanwhile
        return False

    def _drop(self, key: ExpertKey) -> None:
        self._free.append(self._records.pop(key).slot)

    def _read(self, keys: Sequence[ExpertKey], missing: Sequence[ExpertKey]) -> dict[ExpertKey, ExpertReadError]:
        """Into the slots that the missing ones have; -> what is wrong with whom."""
        runs = [list(missing)] if len(missing) == len(keys) else [[key] for key in missing]
        errors: dict[ExpertKey, ExpertReadError] = {}
        for run in filter(None, runs):
            try:
                found = self._store.read_run(run, [self._view(self._records[key].slot) for key in run])
            except Exception as error:  # the slots have to be given back, whatever it is
                found = [ExpertReadError(key, f"{type(error).__name__}: {error}") for key in run]
            errors.update({key: error for key, error in zip(run, found, strict=True) if error is not None})
        return errors

    def _view(self, slot: int) -> memoryview:
        nbytes = self._store.record_nbytes
        return self._memory[slot * nbytes : (slot + 1) * nbytes]
