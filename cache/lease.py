"""The right to compute with experts: what a layer call holds while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from cache.transfer_queue import Ticket

if TYPE_CHECKING:
    from cache.residents import Residents

Phase = Literal["prefill", "decode"]


class Entry:
    """One expert that has a slot: still loading, ready, or failed (then it has left the table)."""

    __slots__ = (
        *("arrived_at", "distance", "error", "is_joined", "key", "phase", "pins", "ready", "slot", "ticket"),
        "hits",
        "used_at",
    )

    def __init__(
        self, key: ExpertKey, slot: int, distance: int | None = None, phase: Phase | None = None, now: float = 0.0
    ) -> None:
        """`phase`: of the lease that it is fetched for now; None: nobody waits for it yet."""
        self.key = key
        self.slot = slot
        self.distance = distance  # layers ahead that it was prefetched, until it is asked for
        self.phase = phase
        self.arrived_at = now
        self.used_at = None if phase is None else now  # None: never yet
        self.ticket: Ticket | None = None
        self.pins = 0
        self.hits = 0  # times that it was asked for while ready
        self.ready = False
        self.is_joined = False  # somebody asked for it after its read had begun
        self.error: ExpertReadError | None = None


class Lease:
    """The right to compute with some experts of one layer call. Iterate `batches`, then `release` (or use `with`).

    An expert is pinned from the moment it is found or given a slot until the lease ends, or, when the experts do not
    all fit, until it has been computed: the layer is then computed in waves. A lease that waits for a slot pins none
    that is computed, so leases of several threads cannot deadlock.
    """

    def __init__(self, residents: Residents, phase: Phase) -> None:
        self._residents = residents
        self._phase = phase
        self._held: list[Entry] = []  # pinned by this lease
        self._awaited: list[Entry] = []  # pinned by this lease, not handed out yet
        self._waiting: list[ExpertKey] = []  # no slot yet
        self._found: list[tuple[ExpertKey, int]] = []  # ready from the start, not handed out yet
        self._released = False

    def batches(self) -> Iterator[list[tuple[ExpertKey, int]]]:
        """Yield groups of (key, slot) as they become ready: the resident ones first, then each miss as it arrives.

        What a step has yielded may be computed until the next one is asked for. Raises `ExpertReadError` for a record
        that cannot be read.
        """
        if self._found:
            found, self._found = self._found, []
            yield found
        while self._awaited or self._waiting:
            yield self._next_batch()

    def release(self) -> None:
        """End the lease; calling it again does nothing."""
        if self._released:
            return
        self._released = True
        residents = self._residents
        with residents.changed:
            residents.pool.handed_back(entry.slot for entry in self._held)
            for entry in self._held:
                entry.pins -= 1
            self._held.clear()
            self._awaited.clear()
            self._waiting.clear()
            residents.changed.notify_all()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def pin_found(self, keys: Sequence[ExpertKey], now: float) -> int:
        """To begin with: what is here, so that no miss evicts it. -> how many are ready. Under the cache's lock."""
        residents = self._residents
        entries, policy = residents.entries, residents.policy
        for key in keys:
            entry = entries.get(key)
            if entry is None:
                self._waiting.append(key)
                residents.counts.missed(key)
                continue
            if entry.distance is not None:
                residents.asked_for(entry)
            entry.used_at = now
            policy.touch(key)
            if entry.ready:
                entry.hits += 1
                entry.pins += 1
                self._held.append(entry)
                self._found.append((key, entry.slot))
            else:
                residents.books.phases[self._phase].joined += 1
                residents.counts.missed(key)
                self._join(entry)
        residents.pool.handed_out(slot for _, slot in self._found)
        return len(self._found)

    def fetch(self) -> None:
        """Then: what is not here, as far as there are slots for it. Under the cache's lock."""
        if self._waiting:
            self._load_waiting()
            self._residents.transfer.send()
            self._residents.books.num_waves += bool(self._waiting)

    def _load_waiting(self) -> None:
        residents = self._residents
        for i, key in enumerate(self._waiting):
            entry = residents.entries.get(key)  # another lease may have asked for it since
            if entry is None:
                taken = residents.take_on_demand()
                if taken is None:
                    del self._waiting[:i]
                    return
                self._pin(residents.load(key, taken, phase=self._phase))
            else:
                if entry.distance is not None:
                    residents.asked_for(entry)
                residents.policy.touch(key)
                self._join(entry)
        self._waiting.clear()

    def _join(self, entry: Entry) -> None:
        """Wait for a read that is under way, and may have begun before."""
        assert entry.ticket is not None
        entry.is_joined |= not entry.ready and not entry.ticket.is_queued
        self._pin(entry)

    def _pin(self, entry: Entry) -> None:
        entry.pins += 1
        self._held.append(entry)
        self._awaited.append(entry)

    def _next_batch(self) -> list[tuple[ExpertKey, int]]:
        residents = self._residents
        stalled_from: float | None = None
        with residents.changed:
            while True:
                if self._waiting:  # what was handed out is computed by now: its slots serve the next wave
                    self._unpin_computed()
                    self._load_waiting()
                    residents.transfer.send()
                for entry in self._awaited:
                    if entry.error is not None:
                        raise ExpertReadError(entry.key, entry.error.why) from entry.error
                ready = [entry for entry in self._awaited if entry.ready]
                if ready and len(ready) >= min(len(self._awaited), residents.wave):
                    self._awaited = [entry for entry in self._awaited if not entry.ready]
                    break
                if stalled_from is None:
                    stalled_from = residents.clock()
                residents.changed.wait()
            if stalled_from is not None:
                residents.books.phases[self._phase].stall_s += residents.clock() - stalled_from
            residents.pool.handed_out(entry.slot for entry in ready)
        return [(entry.key, entry.slot) for entry in ready]

    def _unpin_computed(self) -> None:
        awaited = {id(entry) for entry in self._awaited}
        computed = [entry for entry in self._held if id(entry) not in awaited]
        for entry in computed:
            entry.pins -= 1
        if computed:
            self._residents.pool.handed_back(entry.slot for entry in computed)
            self._held = list(self._awaited)
            self._residents.changed.notify_all()
