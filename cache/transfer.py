"""Moves records from a lower tier into slots: what is waited for first, then what will save most, on a few I/O threads.

A link is one lower tier's way up. Demand overtakes every prefetch that has not begun, records that lie beside one
another are read together, and the number of reads under way is what this device was measured to need.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from cache.link_speed import WEIGHT, DepthTrials, Rate

OnDone = Callable[[ExpertReadError | None], None]

_AHEAD_NBYTES = 2 * 1024**2  # of uncertain prefetches that are being read at most, or one record
_CERTAIN = 0.98  # benefit from which on a prefetch is sure to be asked for
_TOGETHER_NBYTES = 1024**2  # at most in one read of neighbours: the first of them waits for the last


class Source(Protocol):
    """What records are read from."""

    @property
    def record_nbytes(self) -> int: ...

    def position(self, key: ExpertKey) -> int:
        """Where a record lies; neighbours differ by one."""
        ...

    def read_run(self, keys: Sequence[ExpertKey], buffers: Sequence[memoryview]) -> list[ExpertReadError | None]:
        """Fill the buffers with verified records of neighbours, ascending, in one read; -> what is wrong with each."""
        ...

    def demote(self, key: ExpertKey, record: memoryview) -> None:
        """A verified record leaves the tier above; it is about to be overwritten there."""
        ...


class Ticket:
    """One record on its way."""

    __slots__ = ("benefit", "buffer", "evicted", "is_demand", "is_queued", "key", "on_done", "position")

    def __init__(
        self,
        key: ExpertKey,
        position: int,
        buffer: memoryview,
        on_done: OnDone,
        benefit: float,
        evicted: ExpertKey | None,
    ) -> None:
        self.key = key
        self.position = position
        self.buffer = buffer
        self.on_done = on_done
        self.benefit = benefit
        self.evicted = evicted  # whose record the buffer still holds
        self.is_demand = False
        self.is_queued = True  # not begun, not cancelled


class TransferEngine:
    """`submit` returns at once; `on_done(error)` is called on an I/O thread when the record is in place and verified.

    A read that fails is tried once more before it is reported as failed. `link_bandwidth` (bytes/s) makes the source
    behave like a link of that speed: one record at a time, none faster.
    """

    def __init__(self, source: Source, max_depth: int, *, link_bandwidth: float | None = None) -> None:
        self._source = source
        self._link_bandwidth = link_bandwidth
        self._depths = DepthTrials(max_depth)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # there may be something to read
        self._link = threading.Condition(self._lock)  # somebody may cross it
        self._demands: deque[Ticket] = deque()
        self._prefetches: list[tuple[float, int, Ticket]] = []  # heap, the most useful first
        self._order = count()
        self._queued: dict[int, Ticket] = {}  # by position
        self._num_running = self._num_running_prefetches = 0
        self._is_closing = False
        self._max_uncertain = max(1, _AHEAD_NBYTES // source.record_nbytes)
        self._link_is_busy = False
        self._num_demands_at_link = 0
        self._rate = Rate()
        self.queued_nbytes = self.running_nbytes = 0
        self.num_ahead = 0  # records whose read began before anybody waited for them
        self.num_reads = self.num_retries = self.num_errors = self.num_cancelled = 0
        self.read_s = 0.0  # summed over threads
        self.latency_s = 0.0  # of one read, averaged
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-io-{i}", daemon=True) for i in range(max_depth)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def depth(self) -> int:
        """Reads that may be under way now."""
        return self._depths.depth

    @property
    def bandwidth(self) -> float | None:
        """Bytes/s while reads are under way, averaged; None before the first sample."""
        return self._rate.average

    @property
    def in_flight_nbytes(self) -> int:
        """Queued or being read."""
        return self.queued_nbytes + self.running_nbytes

    def submit(
        self,
        key: ExpertKey,
        buffer: memoryview,
        on_done: OnDone,
        *,
        benefit: float | None = None,
        evicted: ExpertKey | None = None,
    ) -> Ticket:
        """Queue a read; without `benefit` somebody waits. `evicted`: whose record the buffer holds until then."""
        ticket = Ticket(key, self._source.position(key), buffer, on_done, benefit or 0.0, evicted)
        with self._lock:
            if self._is_closing:
                raise RuntimeError("the transfer engine is closed")
            self._queued[ticket.position] = ticket
            self.queued_nbytes += self._source.record_nbytes
            if benefit is None:
                ticket.is_demand = True
                self._demands.append(ticket)
            else:
                heapq.heappush(self._prefetches, (-benefit, next(self._order), ticket))
            self._work.notify()
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """Somebody waits for it now."""
        with self._lock:
            if not ticket.is_demand:
                ticket.is_demand = True
                if ticket.is_queued:
                    self._demands.append(ticket)
                    self._work.notify()
                else:
                    self._link.notify_all()

    def cancel(self, ticket: Ticket) -> bool:
        """Forget a read that has not begun and nobody waits for; whether it was one. Its `on_done` is never called."""
        with self._lock:
            if not ticket.is_queued or ticket.is_demand:
                return False
            self._take(ticket)
            self.num_cancelled += 1
            return True

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        with self._lock:
            self._is_closing = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self, ticket: Ticket) -> None:
        ticket.is_queued = False
        del self._queued[ticket.position]
        self.queued_nbytes -= self._source.record_nbytes

    def _run(self) -> None:
        while True:
            tickets, is_demand = self._next()
            if not tickets:
                return
            started = time.perf_counter()
            errors, num_retries = self._read(tickets)
            seconds = time.perf_counter() - started
            if self._link_bandwidth is not None:
                self._cross_link(tickets, self._link_bandwidth)
            self._finished(tickets, is_demand, seconds, num_retries, sum(error is not None for error in errors))
            for ticket, error in zip(tickets, errors, strict=True):
                ticket.on_done(error)

    def _next(self) -> tuple[list[Ticket], bool]:
        """The next read, one record or neighbours, and whether somebody waits; empty when nothing more is to come."""
        with self._lock:
            while True:
                ticket = self._first()
                if ticket is not None:
                    is_demand = ticket.is_demand
                    tickets = self._with_neighbours(ticket)
                    self._num_running += 1
                    self._num_running_prefetches += not is_demand
                    self.running_nbytes += len(tickets) * self._source.record_nbytes
                    self._rate.begin()
                    return tickets, is_demand
                if self._is_closing and not self._queued:
                    self._work.notify_all()
                    return [], False
                self._work.wait()

    def _first(self) -> Ticket | None:
        """The ticket to serve now, if one more read may begin."""
        while self._demands and not self._demands[0].is_queued:
            self._demands.popleft()
        while self._prefetches and not (self._prefetches[0][2].is_queued and not self._prefetches[0][2].is_demand):
            heapq.heappop(self._prefetches)
        depth = self._depths.depth
        if self._demands:
            return self._demands.popleft() if self._num_running < depth else None
        if not self._prefetches or self._num_running >= depth:
            return None
        # a read that has begun cannot be overtaken, and takes its share of the device from what is waited for
        is_certain = self._prefetches[0][2].benefit >= _CERTAIN
        limit = max(depth - 1, self._max_uncertain) if is_certain else self._max_uncertain
        return heapq.heappop(self._prefetches)[2] if self._num_running_prefetches < limit else None

    def _with_neighbours(self, ticket: Ticket) -> list[Ticket]:
        limit = max(1, _TOGETHER_NBYTES // self._source.record_nbytes)
        run = deque([ticket])
        self._take(ticket)
        for step in (1, -1):
            position = ticket.position + step
            while len(run) < limit and (other := self._queued.get(position)) is not None:
                if other.is_demand != ticket.is_demand:
                    break
                self._take(other)
                run.append(other) if step > 0 else run.appendleft(other)
                position += step
        return list(run)

    def _read(self, tickets: list[Ticket]) -> tuple[list[ExpertReadError | None], int]:
        """-> what is wrong with each, after a second try of those with something wrong; how many those were."""
        for ticket in tickets:
            if ticket.evicted is not None:
                self._source.demote(ticket.evicted, ticket.buffer)
        errors = self._read_once(tickets)
        again = [i for i, error in enumerate(errors) if error is not None]
        for i in again:
            (errors[i],) = self._read_once([tickets[i]])
        return errors, len(again)

    def _read_once(self, tickets: list[Ticket]) -> list[ExpertReadError | None]:
        try:
            return self._source.read_run([t.key for t in tickets], [t.buffer for t in tickets])
        except Exception as error:  # a waiting lease must hear of it, whatever it is
            return [ExpertReadError(t.key, f"{type(error).__name__}: {error}") for t in tickets]

    def _cross_link(self, tickets: list[Ticket], bandwidth: float) -> None:
        """Hold the link for as long as the records take; who is waited for goes first."""
        with self._lock:
            is_demand = any(ticket.is_demand for ticket in tickets)
            self._num_demands_at_link += is_demand
            while self._link_is_busy or (self._num_demands_at_link and not is_demand):
                self._link.wait()
                if not is_demand and any(ticket.is_demand for ticket in tickets):  # promoted
                    is_demand = True
                    self._num_demands_at_link += 1
            self._link_is_busy = True
        time.sleep(len(tickets) * self._source.record_nbytes / bandwidth)
        with self._lock:
            self._link_is_busy = False
            self._num_demands_at_link -= is_demand
            self._link.notify_all()

    def _finished(
        self, tickets: list[Ticket], is_demand: bool, seconds: float, num_retries: int, num_errors: int
    ) -> None:
        nbytes = len(tickets) * self._source.record_nbytes
        with self._lock:
            self._num_running -= 1
            self._num_running_prefetches -= not is_demand
            self.running_nbytes -= nbytes
            self.num_reads += len(tickets)
            self.num_ahead += 0 if is_demand else len(tickets)
            self.num_retries += num_retries
            self.num_errors += num_errors
            self.read_s += seconds
            self.latency_s += (seconds - self.latency_s) * (WEIGHT if self.latency_s else 1.0)
            self._rate.add(nbytes, is_idle=self._num_running == 0)
            self._depths.add(nbytes, has_queue=bool(self._queued))
            self._work.notify_all()
