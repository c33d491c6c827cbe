"""The arena of the top tier on a device: equal slots in one allocation, and what must have run before one is reused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cache.device.device import Device, Event, Region
from cache.slot_pool import SlotPool


@dataclass(frozen=True, slots=True)
class SlotBuffer:
    """A slot that is to be written."""

    region: Region
    after: tuple[Event, ...]  # of the last that read it, or wrote it without anybody reading it since
    written: Callable[[Event], None]  # to be told of the copy that fills it, before anybody may compute with it


class DevicePool(SlotPool):
    """As `SlotPool`, on a device whose compute runs after the call that asked for it.

    A lease that ends says only that its work was put into the compute stream. So it leaves an event there, and whoever
    writes the slot next waits for that; the compute stream waits for the copy that has filled a slot before it reads.
    """

    def __init__(self, device: Device, num_slots: int, slot_nbytes: int) -> None:
        """Raises `cache.device.device.DeviceOutOfMemory`."""
        if num_slots < 1:
            raise ValueError("a slot pool needs at least one slot")
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        self.memory = device.allocate(num_slots * slot_nbytes)
        self._compute = device.compute
        self._free = list(range(num_slots - 1, -1, -1))
        self._read: dict[int, Event] = {}  # by slot, the last reader's
        self._written: dict[int, Event] = {}  # by slot, until the compute stream has waited for it

    def region(self, slot: int) -> Region:
        """The bytes of a slot."""
        return Region(self.memory, slot * self.slot_nbytes, self.slot_nbytes)

    def buffer(self, slot: int) -> SlotBuffer:
        events = (self._read.get(slot), self._written.get(slot))
        after = tuple(event for event in events if event is not None)
        return SlotBuffer(self.region(slot), after, lambda event: self._written.__setitem__(slot, event))

    def handed_out(self, slots: Iterable[int]) -> None:
        for slot in slots:
            event = self._written.pop(slot, None)
            if event is not None:
                self._compute.wait(event)

    def handed_back(self, slots: Iterable[int]) -> None:
        event: Event | None = None
        for slot in slots:
            event = event or self._compute.record()
            self._read[slot] = event
