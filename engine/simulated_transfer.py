"""A transfer engine whose time is simulated: the real queue, on a link that is a few numbers. Moves no bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

from cache.expert_key import ExpertKey
from cache.link_speed import WEIGHT
from cache.stats import Link, LinkStats
from cache.transfer_queue import Buffer, OnDone, Ticket, TransferQueue
from engine.calibration import Calibration

_NOTHING = memoryview(b"")


class SimulatedHost:
    """Which records lie in the tier between: as `cache.host_tier.HostTier` keeps them."""

    def __init__(self, num_slots: int, held: Iterable[ExpertKey] = (), *, exclusive: bool = False) -> None:
        """`held`: what is there from the start."""
        self._num_slots = num_slots
        self._exclusive = exclusive
        self._held: OrderedDict[ExpertKey, None] = OrderedDict.fromkeys(held)  # least recently used first
        self.num_hits = 0

    def read(self, key: ExpertKey) -> bool:
        """A record goes up; whether it was here."""
        if key not in self._held:
            return False
        self.num_hits += 1
        if self._exclusive:
            del self._held[key]
        else:
            self._held.move_to_end(key)
        return True

    def arrived(self, key: ExpertKey) -> None:
        """A record came from below."""
        if not self._exclusive:
            self._held.setdefault(key)
            self.trim()

    def demote(self, key: ExpertKey) -> None:
        """A record was evicted above."""
        if self._exclusive:
            self._held.setdefault(key)

    def trim(self) -> None:
        """What came down while others went up is too much no longer."""
        while len(self._held) > self._num_slots:
            self._held.popitem(last=False)


class _Read:
    """Neighbours on their way: first a time that depends on nothing, then bytes at the disk's rate, then the link."""

    def __init__(self, tickets: list[Ticket], is_demand: bool, began: float) -> None:
        self.tickets = tickets
        self.is_demand = is_demand  # when it began
        self.began = began
        self.waits_s = 0.0
        self.nbytes_left = 0.0
        self.from_disk: list[ExpertKey] = []

    @property
    def is_waited_for(self) -> bool:
        return any(ticket.is_demand for ticket in self.tickets)


class SimulatedTransfer:
    """As `cache.transfer.TransferEngine`. Time passes only in `compute` and `wait`."""

    def __init__(
        self,
        calibration: Calibration,
        position: Callable[[ExpertKey], int],
        *,
        link_bandwidth: float | None = None,
        host: SimulatedHost | None = None,
    ) -> None:
        """`link_bandwidth`: bytes/s, instead of the calibration's own."""
        self.now = 0.0
        self._calibration = calibration
        self._nbytes = calibration.record_nbytes
        self._position = position
        self._link_bandwidth = link_bandwidth or calibration.link_bandwidth
        self._host = host
        self._queue = TransferQueue(self._nbytes, calibration.max_depth, self.clock)
        self._reading: list[_Read] = []
        self._at_link: list[_Read] = []  # the first is crossing if the link is busy
        self._crossing: _Read | None = None
        self._crossing_left_s = 0.0
        self._rates = [0.0, *(calibration.disk.rate(n) / n for n in range(1, calibration.max_depth + 1))]
        self.num_submitted = self.num_ahead = self.num_reads = self.num_retries = self.num_errors = 0
        self.read_s = self.latency_s = 0.0

    def clock(self) -> float:
        """The simulated time, seconds."""
        return self.now

    @property
    def depth(self) -> int:
        return self._queue.depth

    @property
    def bandwidth(self) -> float | None:
        return self._queue.bandwidth

    @property
    def in_flight_nbytes(self) -> int:
        return self._queue.queued_nbytes + self._queue.running_nbytes

    def link_stats(self) -> dict[Link, LinkStats]:
        """Of none: what crosses is told by `SimulatedStep`."""
        return {}

    def submit(
        self,
        key: ExpertKey,
        buffer: Buffer,
        on_done: OnDone,
        *,
        benefit: float | None = None,
        evicted: ExpertKey | None = None,
    ) -> Ticket:
        ticket = Ticket(key, self._position(key), _NOTHING, on_done, benefit or 0.0, evicted)
        self._queue.add(ticket, benefit)
        self.num_submitted += 1
        return ticket

    def send(self) -> None:
        """Nothing: each read begins when it may."""

    def poll(self) -> None:
        """Nothing: what arrives is told as time passes."""

    def promote(self, ticket: Ticket) -> None:
        self._queue.promote(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        return self._queue.cancel(ticket)

    def close(self) -> None:
        """Nothing runs."""

    def compute(self, seconds: float) -> None:
        """The other thread computes for so long, longer while records are read."""
        if seconds <= 0.0:
            return
        slowdown = self._calibration.offload.compute_slowdown
        self._begin_reads()
        while seconds > 0.0:
            if not self._reading and self._crossing is None:
                self.now += seconds
                return
            pace = slowdown if self._reading else 1.0
            passed = min(seconds * pace, self._next_event_s(is_computing=True))
            seconds = 0.0 if passed == seconds * pace else seconds - passed / pace
            self._pass(passed, is_computing=True)

    def wait(self) -> None:
        """Until a read ends and its records are in place."""
        self._begin_reads()
        if not self._reading and self._crossing is None:
            raise AssertionError("waiting for what is not on its way")
        num_reads = self.num_reads
        while self.num_reads == num_reads:
            self._pass(self._next_event_s(is_computing=False), is_computing=False)

    def _begin_reads(self) -> None:
        while not self._queue.is_empty:
            tickets, is_demand = self._queue.next()
            if not tickets:
                return
            read = _Read(tickets, is_demand, self.now)
            read.from_disk = [ticket.key for ticket in tickets]
            if self._host is not None:
                self._ask_host(self._host, read)
            if read.from_disk:
                read.waits_s += self._calibration.disk.latency_s
                read.nbytes_left = float(len(read.from_disk) * self._nbytes)
            self._reading.append(read)

    def _ask_host(self, host: SimulatedHost, read: _Read) -> None:
        for ticket in read.tickets:
            if ticket.evicted is not None:
                host.demote(ticket.evicted)
        num_wanted = len(read.from_disk)
        read.from_disk = [key for key in read.from_disk if not host.read(key)]
        host.trim()
        if self._calibration.host_bandwidth is not None:
            read.waits_s += (num_wanted - len(read.from_disk)) * self._nbytes / self._calibration.host_bandwidth

    def _next_event_s(self, *, is_computing: bool) -> float:
        """Seconds until a read's state changes if nothing else happens; infinite if none is under way."""
        rate = self._rate(is_computing)
        times = [read.waits_s if read.waits_s > 0.0 else read.nbytes_left / rate for read in self._reading]
        if self._crossing is not None:
            times.append(self._crossing_left_s)
        return min(times, default=float("inf"))

    def _rate(self, is_computing: bool) -> float:
        num_from_disk = sum(read.nbytes_left > 0.0 for read in self._reading)
        rate = self._rates[min(num_from_disk, len(self._rates) - 1)] if num_from_disk else 1.0
        return rate / self._calibration.offload.read_slowdown if is_computing else rate

    def _pass(self, seconds: float, *, is_computing: bool) -> None:
        rate = self._rate(is_computing)
        self.now += seconds
        num_reads = self.num_reads
        still: list[_Read] = []
        for read in self._reading:
            if read.waits_s > 0.0:
                read.waits_s = _less(read.waits_s, seconds)
            else:
                read.nbytes_left = _less(read.nbytes_left, seconds * rate)
            if read.waits_s > 0.0 or read.nbytes_left > 0.0:
                still.append(read)
            else:
                self._was_read(read)
        self._reading = still
        if self._crossing is not None:
            self._crossing_left_s = _less(self._crossing_left_s, seconds)
            if self._crossing_left_s == 0.0:
                crossed, self._crossing = self._crossing, None
                self._finished(crossed)
        if self._at_link:
            self._cross()
        if self.num_reads != num_reads:
            self._begin_reads()

    def _was_read(self, read: _Read) -> None:
        if self._host is not None:
            for key in read.from_disk:
                self._host.arrived(key)
        took = self.now - read.began
        self.read_s += took
        self.latency_s += (took - self.latency_s) * (WEIGHT if self.latency_s else 1.0)
        if self._link_bandwidth is None:
            self._finished(read)
        else:
            self._at_link.append(read)

    def _cross(self) -> None:
        """Who is waited for goes first."""
        if self._crossing is None and self._at_link and self._link_bandwidth is not None:
            read = min(self._at_link, key=lambda one: not one.is_waited_for)
            self._at_link.remove(read)
            self._crossing = read
            nbytes = len(read.tickets) * self._nbytes
            self._crossing_left_s = nbytes / self._link_bandwidth + self._calibration.crossing_s

    def _finished(self, read: _Read) -> None:
        self._queue.finished(len(read.tickets), is_demand=read.is_demand)
        self.num_reads += len(read.tickets)
        self.num_ahead += 0 if read.is_demand else len(read.tickets)
        for ticket in read.tickets:
            ticket.on_done(None)


class Arrival(threading.Condition):
    """What an `ExpertCache` waits on: waiting lets simulated time pass."""

    def __init__(self, transfer: SimulatedTransfer, arrival_s: float) -> None:
        super().__init__()
        self._transfer = transfer
        self._arrival_s = arrival_s

    def wait(self, timeout: float | None = None) -> bool:
        self._transfer.wait()
        self._transfer.compute(self._arrival_s)
        return True


def _less(left: float, passed: float) -> float:
    """What is left; nothing where only rounding is."""
    return left - passed if left - passed > 1e-9 * left else 0.0
