"""Moves records from a lower tier into slots: what is waited for first, then what will save most, on a few I/O threads.

A link is one lower tier's way up. Demand overtakes every prefetch that has not begun, records that lie beside one
another are read together, and the number of reads under way is what this device was measured to need.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from cache.link_speed import WEIGHT
from cache.stats import Link, LinkCounters, LinkStats
from cache.transfer_queue import Buffer, OnDone, Ticket, TransferQueue

_ANNOUNCED_S = 500e-6  # before a link is free its next record is chosen
_WORTH_SLEEPING_S = 30e-6  # what arrives early by less is made up for by the next


class Source(Protocol):
    """What records are read from."""

    @property
    def record_nbytes(self) -> int: ...

    def position(self, key: ExpertKey) -> int:
        """Where a record lies; neighbours differ by one."""
        ...

    def link(self, key: ExpertKey) -> Link:
        """Where from it would be read now."""
        ...

    def read_run(self, keys: Sequence[ExpertKey], buffers: Sequence[Buffer]) -> list[ExpertReadError | None]:
        """Fill the buffers with verified records of neighbours, ascending, in one read; -> what is wrong with each."""
        ...

    def demote(self, key: ExpertKey, record: Buffer) -> None:
        """A verified record leaves the tier above; it is about to be overwritten there."""
        ...


class Transfer(Protocol):
    """What `ExpertCache` asks of it: `TransferEngine`, or a stand-in whose time is simulated."""

    @property
    def num_ahead(self) -> int:
        """Records whose read began before anybody waited for them."""
        ...

    @property
    def num_reads(self) -> int: ...

    @property
    def num_retries(self) -> int: ...

    @property
    def num_errors(self) -> int: ...

    @property
    def read_s(self) -> float:
        """Summed over threads."""
        ...

    @property
    def latency_s(self) -> float:
        """Of one read, averaged."""
        ...

    @property
    def depth(self) -> int: ...

    @property
    def bandwidth(self) -> float | None: ...

    @property
    def in_flight_nbytes(self) -> int: ...

    def link_stats(self) -> dict[Link, LinkStats]: ...

    def submit(
        self,
        key: ExpertKey,
        buffer: Buffer,
        on_done: OnDone,
        *,
        benefit: float | None = None,
        evicted: ExpertKey | None = None,
    ) -> Ticket: ...

    def send(self) -> None:
        """Begin with what was submitted, where that waits for more."""
        ...

    def promote(self, ticket: Ticket) -> None: ...

    def cancel(self, ticket: Ticket) -> bool: ...

    def poll(self) -> None:
        """Call `on_done` of what has arrived, where no thread of its own does; under the lock of who is told."""
        ...

    def close(self) -> None: ...


class TransferEngine:
    """`submit` returns at once; `on_done(error)` is called on an I/O thread when the record is in place and verified.

    A read that fails is tried once more before it is reported as failed. `link_bandwidth` (bytes/s) makes the source
    behave like a link of that speed: one record at a time.
    """

    def __init__(self, source: Source, max_depth: int, *, link_bandwidth: float | None = None) -> None:
        self._source = source
        self._link_bandwidth = link_bandwidth
        self._queue = TransferQueue(source.record_nbytes, max_depth)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # there is something to read
        self._num_idle = self._num_waking = 0  # threads that wait for it; of them those told, that have not looked yet
        self._link = threading.Condition(self._lock)  # somebody may cross it
        self._is_closing = False
        self._link_free_at = 0.0
        self._num_demands_at_link = 0
        self.num_ahead = 0  # records whose read began before anybody waited for them
        self.num_reads = self.num_retries = self.num_errors = self.num_cancelled = 0
        self.read_s = 0.0  # summed over threads
        self.latency_s = 0.0  # of one read, averaged
        self._links: dict[Link, LinkCounters] = {}
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-io-{i}", daemon=True) for i in range(max_depth)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def depth(self) -> int:
        """Reads that may be under way now."""
        return self._queue.depth

    @property
    def bandwidth(self) -> float | None:
        """Bytes/s while reads are under way, averaged; None before the first sample."""
        return self._queue.bandwidth

    @property
    def in_flight_nbytes(self) -> int:
        """Queued or being read."""
        return self._queue.queued_nbytes + self._queue.running_nbytes

    def link_stats(self) -> dict[Link, LinkStats]:
        """Of each link that anything has come over."""
        with self._lock:
            return {link: counters.snapshot() for link, counters in self._links.items()}

    def submit(
        self,
        key: ExpertKey,
        buffer: Buffer,
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
            self._queue.add(ticket, benefit)
            self._wake()
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """Somebody waits for it now."""
        with self._lock:
            if not ticket.is_demand:
                self._queue.promote(ticket)
                if ticket.is_queued:
                    self._wake()
                else:
                    self._link.notify_all()

    def cancel(self, ticket: Ticket) -> bool:
        """Forget a read that has not begun and nobody waits for; whether it was one. Its `on_done` is never called."""
        with self._lock:
            is_cancelled = self._queue.cancel(ticket)
            self.num_cancelled += is_cancelled
            return is_cancelled

    def send(self) -> None:
        """Nothing: each read begins when it may."""

    def poll(self) -> None:
        """Nothing: the I/O threads tell."""

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        with self._lock:
            self._is_closing = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

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
            self._finished(tickets, is_demand, started, seconds, num_retries, errors)
            for ticket, error in zip(tickets, errors, strict=True):
                ticket.on_done(error)

    def _next(self) -> tuple[list[Ticket], bool]:
        """The next read, one record or neighbours, and whether somebody waits; empty when nothing more is to come."""
        with self._lock:
            while True:
                tickets, is_demand = self._queue.next()
                if tickets:
                    self._wake()
                    return tickets, is_demand
                if self._is_closing and self._queue.is_empty:
                    self._work.notify_all()
                    return [], False
                self._num_idle += 1
                self._work.wait()
                self._num_idle -= 1
                self._num_waking = max(0, self._num_waking - 1)

    def _wake(self) -> None:
        """One more thread, if it may begin to read; it wakes the next. All at once would cost more than small reads."""
        if self._num_waking < min(self._num_idle, self._queue.num_may_begin):
            self._num_waking += 1
            self._work.notify()

    def _read(self, tickets: list[Ticket]) -> tuple[list[ExpertReadError | None], int]:
        """-> what is wrong with each, after a second try of those with something wrong; how many those were."""
        for ticket in tickets:
            ticket.link = self._source.link(ticket.key)
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
        """Wait until the records have crossed the link, one after the other; who is waited for goes first.

        Each crossing begins when the one before ended, however late that was noticed.
        """
        ready = time.perf_counter()
        with self._lock:
            is_demand = False
            while True:
                if not is_demand and any(ticket.is_demand for ticket in tickets):  # from the start, or promoted
                    is_demand = True
                    self._num_demands_at_link += 1
                until_turn_s = self._link_free_at - _ANNOUNCED_S - time.perf_counter()
                if until_turn_s > 0:
                    self._link.wait(until_turn_s)
                elif not is_demand and self._num_demands_at_link:
                    self._link.wait()
                else:
                    break
            crossed = max(ready, self._link_free_at) + len(tickets) * self._source.record_nbytes / bandwidth
            self._link_free_at = crossed
            self._num_demands_at_link -= is_demand
            if is_demand:
                self._link.notify_all()
        left_s = crossed - time.perf_counter()
        if left_s > _WORTH_SLEEPING_S:
            time.sleep(left_s)

    def _finished(
        self,
        tickets: list[Ticket],
        is_demand: bool,
        started: float,
        seconds: float,
        num_retries: int,
        errors: list[ExpertReadError | None],
    ) -> None:
        """`seconds`: of reading alone."""
        ended = time.perf_counter()
        with self._lock:
            self._count_links(tickets, started, ended, is_demand=is_demand)
            self._queue.finished(len(tickets), is_demand=is_demand)
            self.num_reads += len(tickets)
            self.num_ahead += 0 if is_demand else len(tickets)
            self.num_retries += num_retries
            self.num_errors += sum(error is not None for error in errors)
            self.read_s += seconds
            self.latency_s += (seconds - self.latency_s) * (WEIGHT if self.latency_s else 1.0)

    def _count_links(self, tickets: list[Ticket], started: float, ended: float, *, is_demand: bool) -> None:
        """The time of neighbours that lay in two places is the lower one's."""
        nbytes = self._source.record_nbytes
        num_of = Counter(ticket.link for ticket in tickets) if len(tickets) > 1 else {tickets[0].link: 1}
        for link, num in num_of.items():
            counters = self._links.setdefault(link, LinkCounters())
            counters.add_nbytes(num * nbytes, is_demand=is_demand)
            if link == "disk" or "disk" not in num_of:
                counters.add_read(num * nbytes, started, ended, is_demand=is_demand)
