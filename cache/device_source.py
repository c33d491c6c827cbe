"""What a transfer engine reads from where the top tier is a device: pinned host memory, by one copy for each record."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import count

from cache.device.device import Device, Stream
from cache.device_pool import SlotBuffer
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from cache.pinned_tier import PinnedTier
from cache.stats import Link

_NUM_STREAMS = 2  # so that a copy whose slot is still read does not hold up the next one


class DeviceSource:
    """See `cache.transfer.Source`. A read has ended when its copies have run, so a ready slot holds its record.

    The copies of a read are put on one of a few copy streams, after whatever read the slots last; nobody waits on the
    host for that.
    """

    def __init__(self, device: Device, tier: PinnedTier, num_streams: int = _NUM_STREAMS) -> None:
        self._tier = tier
        self._streams: list[tuple[Stream, threading.Lock]] = [
            (device.stream(f"copy {i}"), threading.Lock()) for i in range(num_streams)
        ]
        self._turns = count()

    @property
    def record_nbytes(self) -> int:
        return self._tier.record_nbytes

    def position(self, key: ExpertKey) -> int:
        return self._tier.position(key)

    def link(self, key: ExpertKey) -> Link:
        """Where from it would come now; what lies in host memory crosses the bus alone."""
        return "host" if key in self._tier else "disk"

    def read_run(self, keys: Sequence[ExpertKey], buffers: Sequence[SlotBuffer]) -> list[ExpertReadError | None]:
        records = self._tier.fetch(keys)
        held = [key for key, record in zip(keys, records, strict=True) if not isinstance(record, ExpertReadError)]
        went_up = False
        try:
            stream, lock = self._next_stream()
            with lock:
                for record, buffer in zip(records, buffers, strict=True):
                    if not isinstance(record, ExpertReadError):
                        for event in buffer.after:
                            stream.wait(event)
                        stream.copy_in(buffer.region._replace(nbytes=len(record)), record)
                done = stream.record()
            for record, buffer in zip(records, buffers, strict=True):
                if not isinstance(record, ExpertReadError):
                    buffer.written(done)
            done.synchronize()
            went_up = True
        finally:
            for key in held:
                self._tier.let_go(key, went_up=went_up)
        return [record if isinstance(record, ExpertReadError) else None for record in records]

    def demote(self, key: ExpertKey, buffer: SlotBuffer) -> None:
        """Where tiers are exclusive, the record comes down before its slot is written again."""
        if not self._tier.exclusive:
            return

        def copy(to: memoryview) -> None:
            stream, lock = self._next_stream()
            with lock:
                for event in buffer.after:
                    stream.wait(event)
                stream.copy_out(to, buffer.region._replace(nbytes=len(to)))
                done = stream.record()
            done.synchronize()

        self._tier.take_back(key, copy)

    def _next_stream(self) -> tuple[Stream, threading.Lock]:
        return self._streams[next(self._turns) % len(self._streams)]
