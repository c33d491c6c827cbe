"""`cache.transfer.TransferEngine` without the interpreter: reads, checksums and the queue run on native threads.

What arrives is told under the cache's lock by whoever asks next, so a read costs no switch between Python threads.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

import numpy as np

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError, ExpertStore
from cache.histogram import HistogramStats
from cache.link_speed import SAMPLE_NBYTES, TRIAL_NBYTES, WEIGHT, WORTH, depths_to_try
from cache.native.library import ARRIVAL, CORRUPT, DISK_ERROR, OK, REQUEST, Counts, Library, Setup, load_library
from cache.stats import READ_S, Link, LinkStats
from cache.transfer_queue import CERTAIN, Buffer, OnDone, Ticket, max_together, max_uncertain

_MAX_ARRIVALS = 64  # told at once


class NativeTransfer:
    """A `cache.transfer.Transfer` that reads an `ExpertStore`'s file itself, by the same rules and with the same retry.

    `arrival` is what its cache has to wait on: `ExpertCache(..., transfer=transfer, arrival=transfer.arrival)`.
    """

    def __init__(self, store: ExpertStore, max_depth: int, *, link_bandwidth: float | None = None) -> None:
        """`link_bandwidth` (bytes/s): as in `TransferEngine`. Raises `RuntimeError` if the library was not built."""
        self._library: Library = load_library()
        self._store = store
        self._tickets: dict[int, Ticket] = {}  # not told of yet, by number
        self._num_submitted = 0
        self._unsent: list[bytes] = []  # each a `REQUEST`
        self._arrivals = _Arrivals()
        self._counts = Counts()
        self._read_counts = np.zeros((2, len(READ_S) + 1), dtype=np.int64)  # of reads ahead, and on demand
        self._read_s = np.zeros(2)
        header = store.header
        checksums = np.array([int(text, 16) for text in header.checksums], dtype=np.uint64)
        depths = np.array(depths_to_try(max_depth), dtype=np.int32)
        bounds = np.array(READ_S)
        setup = Setup(
            data_offset=header.data_offset,
            record_nbytes=header.record_nbytes,
            checksums=checksums.ctypes.data,
            num_records=len(checksums),
            link_bandwidth=link_bandwidth or 0.0,
            rate_weight=WEIGHT,
            rate_sample_nbytes=SAMPLE_NBYTES,
            depths=depths.ctypes.data,
            trial_nbytes=TRIAL_NBYTES,
            worth=WORTH,
            certain=CERTAIN,
            num_depths=len(depths),
            max_depth=max_depth,
            max_uncertain=max_uncertain(header.record_nbytes),
            max_together=max_together(header.record_nbytes),
            fd=store.fileno(),
            is_direct=store.direct,
            read_s_bounds=bounds.ctypes.data,
            num_bounds=len(bounds),
        )
        self._handle: int | None = self._library.open(ctypes.byref(setup))
        self.arrival: threading.Condition = _Arrival(self._wait, self._notify)

    @property
    def num_reads(self) -> int:
        return int(self._counted().num_reads)

    @property
    def num_ahead(self) -> int:
        return int(self._counted().num_ahead)

    @property
    def num_retries(self) -> int:
        return int(self._counted().num_retries)

    @property
    def num_errors(self) -> int:
        return int(self._counted().num_errors)

    @property
    def num_cancelled(self) -> int:
        return int(self._counted().num_cancelled)

    @property
    def read_s(self) -> float:
        return float(self._counted().read_s)

    @property
    def latency_s(self) -> float:
        return float(self._counted().latency_s)

    @property
    def depth(self) -> int:
        """Reads that may be under way now."""
        return int(self._counted().depth)

    @property
    def bandwidth(self) -> float | None:
        """Bytes/s while reads are under way, averaged; None before the first sample."""
        return float(self._counted().bandwidth) or None

    @property
    def in_flight_nbytes(self) -> int:
        """Queued or being read."""
        return int(self._counted().in_flight_nbytes)

    def link_stats(self) -> dict[Link, LinkStats]:
        """Of the disk, once anything has come from it."""
        if not self._num_submitted:
            return {}
        counts = self._counted()
        self._count_reads()
        nbytes = self._store.record_nbytes
        of_each = zip(self._read_counts.tolist(), self._read_s.tolist(), strict=True)
        ahead_s, demand_s = (HistogramStats(num_of, seconds) for num_of, seconds in of_each)
        stats = LinkStats(
            demand_nbytes=(counts.num_reads - counts.num_ahead) * nbytes,
            prefetch_nbytes=counts.num_ahead * nbytes,
            demand_s=demand_s,
            prefetch_s=ahead_s,
            bandwidth=counts.bandwidth,
        )
        return {"disk": stats}

    def submit(
        self,
        key: ExpertKey,
        buffer: Buffer,
        on_done: OnDone,
        *,
        benefit: float | None = None,
        evicted: ExpertKey | None = None,
    ) -> Ticket:
        """As `TransferEngine.submit`, but begins with the next `send`; `evicted` has no tier to go to."""
        if self._handle is None:
            raise RuntimeError("the transfer engine is closed")
        ticket = Ticket(key, self._store.position(key), buffer, on_done, benefit or 0.0, evicted)
        ticket.is_demand = benefit is None
        self._num_submitted += 1
        ticket.number = self._num_submitted
        self._tickets[ticket.number] = ticket
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        ticket.is_queued = False  # may have begun before anybody asks
        self._unsent.append(REQUEST.pack(ticket.number, ticket.position, address, ticket.benefit, ticket.is_demand))
        return ticket

    def send(self) -> None:
        """Begin with what was submitted."""
        if self._unsent:
            self._library.submit(self._handle, b"".join(self._unsent), len(self._unsent))
            self._unsent.clear()

    def promote(self, ticket: Ticket) -> None:
        """Somebody waits for it now."""
        if not ticket.is_demand and self._handle is not None:
            self.send()
            ticket.is_demand = True
            self._library.promote(self._handle, ticket.number)

    def cancel(self, ticket: Ticket) -> bool:
        """As `TransferEngine.cancel`."""
        self.send()
        if self._handle is None or not self._library.cancel(self._handle, ticket.number):
            return False
        del self._tickets[ticket.number]
        return True

    def poll(self) -> None:
        """Call `on_done` of what has arrived; the caller holds the lock of `arrival`."""
        if self._tickets and self._handle is not None:
            arrivals = self._arrivals
            self._tell(self._library.take(self._handle, arrivals.address, _MAX_ARRIVALS), arrivals)

    def close(self) -> None:
        """Finish what was submitted, tell of it and end the threads."""
        with self.arrival:
            if self._handle is None:
                return
            self.send()
            self._library.finish(self._handle)
            while self._tickets:
                self.poll()
            self._counted()
            self._count_reads()
            handle, self._handle = self._handle, None
            self._library.close(handle)

    def _wait(self, num_notified: int, release: Callable[[], object], acquire: Callable[[], object]) -> None:
        """Until something has arrived or `notify` was called again; then tell what has."""
        self.send()
        arrivals = _Arrivals()  # of this thread: others may wait too
        release()
        try:
            num = self._library.wait(self._handle, arrivals.address, _MAX_ARRIVALS, num_notified)
        finally:
            acquire()
        self._tell(num, arrivals)

    def _notify(self) -> int:
        return 0 if self._handle is None else int(self._library.notify(self._handle))

    def _tell(self, num: int, arrivals: _Arrivals) -> None:
        if not num:
            return
        told = []
        for number, status, detail in ARRIVAL.iter_unpack(arrivals.view[: num * ARRIVAL.size]):
            ticket = self._tickets.pop(number)  # all before the first is told: who is told may ask for more
            told.append((ticket, None if status == OK else self._error(ticket.key, status, detail)))
        for ticket, error in told:
            ticket.on_done(error)

    def _error(self, key: ExpertKey, status: int, detail: int) -> ExpertReadError:
        if status == CORRUPT:
            return ExpertReadError(key, "checksum does not match, the packed file is corrupt")
        if status == DISK_ERROR:
            return ExpertReadError(key, f"disk read failed ({os.strerror(detail)})")
        return ExpertReadError(key, f"short read, {detail} of {self._store.record_nbytes} bytes")

    def _counted(self) -> Counts:
        if self._handle is not None:
            self._library.counts(self._handle, ctypes.byref(self._counts))
        return self._counts

    def _count_reads(self) -> None:
        if self._handle is not None:
            self._library.reads(self._handle, self._read_counts.ctypes.data, self._read_s.ctypes.data)


class _Arrivals:
    """Memory for what is told at once, each an `ARRIVAL`."""

    def __init__(self) -> None:
        memory = bytearray(_MAX_ARRIVALS * ARRIVAL.size)
        self.view = memoryview(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))


class _Arrival(threading.Condition):
    """A condition whose waiters are woken by native threads too."""

    def __init__(
        self,
        wait: Callable[[int, Callable[[], object], Callable[[], object]], None],
        notify: Callable[[], int],
    ) -> None:
        self._held = threading.RLock()
        super().__init__(self._held)
        self._wait_for = wait
        self._notify_waiters = notify
        self._num_notified = 0
        self._num_waiting = 0  # threads of Python

    def wait(self, timeout: float | None = None) -> bool:
        """Returns after anything arrived or was notified; the lock is held once."""
        assert timeout is None, "waits for as long as it takes"
        self._wait_for(self._num_notified, self._let_go, self._take_back)
        return True

    def _let_go(self) -> None:
        self._num_waiting += 1
        self._held.release()

    def _take_back(self) -> None:
        self._held.acquire()
        self._num_waiting -= 1

    def notify_all(self) -> None:
        if self._num_waiting:
            self._num_notified = self._notify_waiters()
