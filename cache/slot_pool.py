"""The arena of the top tier on a CPU: equal slots in one page-aligned allocation, and which of them are free."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import Any

from cache.host_memory import record_memory


class SlotPool:
    """`num_slots` slots of `slot_nbytes`. Memory is committed by the system when a slot is first filled.

    Not thread-safe; `ExpertCache` calls it under its lock. Buffers of different slots may be used concurrently.
    """

    def __init__(self, num_slots: int, slot_nbytes: int) -> None:
        if num_slots < 1:
            raise ValueError("a slot pool needs at least one slot")
        if slot_nbytes % mmap.PAGESIZE:
            raise ValueError(f"slot size {slot_nbytes} is not a multiple of the page size {mmap.PAGESIZE}")
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        self.arena = record_memory(num_slots * slot_nbytes)
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A free slot's index, or None if all are taken."""
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Return a slot."""
        self._free.append(slot)

    def buffer(self, slot: int) -> Any:
        """Where a record is to be written: here the bytes of the slot, a writable memoryview, 4 KiB-aligned."""
        return self.arena[slot * self.slot_nbytes : (slot + 1) * self.slot_nbytes]

    def handed_out(self, slots: Iterable[int]) -> None:
        """The thread that computes is going to use them."""

    def handed_back(self, slots: Iterable[int]) -> None:
        """It has no more to do with them; on a device that computes by itself, once that is done."""

    def free_slots(self) -> set[int]:
        """The free slots, for integrity checks."""
        if len(set(self._free)) != len(self._free):
            raise AssertionError("a slot is free twice")
        return set(self._free)
