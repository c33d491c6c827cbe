"""In which order records come up: what is waited for, then what will save most. Knows no threads and no bytes."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from cache.link_speed import DepthTrials, Rate
from cache.stats import Link

Buffer = Any  # what the source fills: a memoryview, or a slot of a device
OnDone = Callable[[ExpertReadError | None], None]

_AHEAD_NBYTES = 2 * 1024**2  # of uncertain prefetches that are being read at most, or one record
CERTAIN = 0.98  # benefit from which on a prefetch is sure to be asked for
TOGETHER_NBYTES = 1024**2  # at most in one read of neighbours: the first of them waits for the last


def max_uncertain(record_nbytes: int) -> int:
    """Uncertain prefetches that are being read at most."""
    return max(1, _AHEAD_NBYTES // record_nbytes)


def max_together(record_nbytes: int) -> int:
    """Neighbours in one read at most."""
    return max(1, TOGETHER_NBYTES // record_nbytes)


class Ticket:
    """One record on its way."""

    __slots__ = (
        *("benefit", "buffer", "evicted", "is_demand", "is_queued", "key", "link", "number", "on_done"),
        "position",
    )

    def __init__(
        self,
        key: ExpertKey,
        position: int,
        buffer: Buffer,
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
        self.link: Link = "disk"  # that it comes over, known when its read begins
        self.number = 0  # among those of its transfer engine, where that counts them


class TransferQueue:
    """What waits, and what is being read. Not thread-safe: a transfer engine calls it under its lock."""

    def __init__(self, record_nbytes: int, max_depth: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._record_nbytes = record_nbytes
        self._depths = DepthTrials(max_depth, clock)
        self._rate = Rate(clock)
        self._demands: deque[Ticket] = deque()
        self._prefetches: list[tuple[float, int, Ticket]] = []  # heap, the most useful first
        self._order = count()
        self._queued: dict[int, Ticket] = {}  # by position
        self._num_running = self._num_running_prefetches = 0
        self._max_uncertain = max_uncertain(record_nbytes)
        self.queued_nbytes = self.running_nbytes = 0

    @property
    def depth(self) -> int:
        """Reads that may be under way now."""
        return self._depths.depth

    @property
    def bandwidth(self) -> float | None:
        """Bytes/s while reads are under way, averaged; None before the first sample."""
        return self._rate.average

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be read."""
        return not self._queued

    @property
    def num_may_begin(self) -> int:
        """Reads that may begin now at most."""
        return min(len(self._queued), self._depths.depth - self._num_running)

    def add(self, ticket: Ticket, benefit: float | None) -> None:
        """Without `benefit` somebody waits."""
        self._queued[ticket.position] = ticket
        self.queued_nbytes += self._record_nbytes
        if benefit is None:
            ticket.is_demand = True
            self._demands.append(ticket)
        else:
            heapq.heappush(self._prefetches, (-benefit, next(self._order), ticket))

    def promote(self, ticket: Ticket) -> None:
        """Somebody waits for it now."""
        if not ticket.is_demand:
            ticket.is_demand = True
            if ticket.is_queued:
                self._demands.append(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        """Forget one that has not begun and nobody waits for; whether it was one."""
        if not ticket.is_queued or ticket.is_demand:
            return False
        self._take(ticket)
        return True

    def next(self) -> tuple[list[Ticket], bool]:
        """The read to begin now, one record or neighbours, and whether somebody waits; empty: none may begin."""
        ticket = self._first()
        if ticket is None:
            return [], False
        is_demand = ticket.is_demand
        tickets = self._with_neighbours(ticket)
        self._num_running += 1
        self._num_running_prefetches += not is_demand
        self.running_nbytes += len(tickets) * self._record_nbytes
        self._rate.begin()
        return tickets, is_demand

    def finished(self, num_records: int, *, is_demand: bool) -> None:
        """A read has ended."""
        nbytes = num_records * self._record_nbytes
        self._num_running -= 1
        self._num_running_prefetches -= not is_demand
        self.running_nbytes -= nbytes
        self._rate.add(nbytes, is_idle=self._num_running == 0)
        self._depths.add(nbytes, has_queue=bool(self._queued))

    def _take(self, ticket: Ticket) -> None:
        ticket.is_queued = False
        del self._queued[ticket.position]
        self.queued_nbytes -= self._record_nbytes

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
        is_certain = self._prefetches[0][2].benefit >= CERTAIN
        limit = max(depth - 1, self._max_uncertain) if is_certain else self._max_uncertain
        return heapq.heappop(self._prefetches)[2] if self._num_running_prefetches < limit else None

    def _with_neighbours(self, ticket: Ticket) -> list[Ticket]:
        limit = max_together(self._record_nbytes)
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
