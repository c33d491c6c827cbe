"""Which experts are in the top tier, who is using them, and which are on their way. Moves no bytes itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Literal

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError, ExpertStore
from cache.policies import POLICIES
from cache.policies.policy import Policy
from cache.slot_pool import SlotPool
from cache.stats import CacheStats, PhaseStats
from cache.transfer import TransferEngine

Phase = Literal["prefill", "decode"]


class _Entry:
    """One expert that has a slot: still loading, ready, or failed (then it has left the table)."""

    __slots__ = ("error", "key", "pins", "ready", "slot")

    def __init__(self, key: ExpertKey, slot: int) -> None:
        self.key = key
        self.slot = slot
        self.pins = 0
        self.ready = False
        self.error: ExpertReadError | None = None


class _PhaseCounters:
    __slots__ = ("hits", "joined", "queries", "stall_s")

    def __init__(self) -> None:
        self.queries = self.hits = self.joined = 0
        self.stall_s = 0.0

    def snapshot(self) -> PhaseStats:
        return PhaseStats(queries=self.queries, hits=self.hits, joined=self.joined, stall_s=self.stall_s)


class Lease:
    """The right to compute with some experts of one layer call. Iterate `batches`, then `release` (or use `with`).

    An expert is pinned from the moment it is found or given a slot until the lease ends, or, when the experts do not
    all fit, until it has been computed: the layer is then computed in waves. A lease that waits for a slot pins none
    that is computed, so leases of several threads cannot deadlock.
    """

    def __init__(self, cache: ExpertCache, keys: Sequence[ExpertKey], phase: Phase) -> None:
        self._cache = cache
        self._phase = phase
        self._held: list[_Entry] = []  # pinned by this lease
        self._awaited: list[_Entry] = []  # pinned by this lease, not handed out yet
        self._waiting = list(keys)  # no slot yet
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
            yield self._cache._next_batch(self)

    def release(self) -> None:
        """End the lease; calling it again does nothing."""
        if not self._released:
            self._released = True
            self._cache._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class ExpertCache:
    """Leases experts to layer calls, fetching the missing ones through the transfer engine. Thread-safe.

    Invariants (`check_integrity`): a slot holds one expert, an expert has at most one slot, free + used == all, a
    pinned or loading expert is never evicted.
    """

    def __init__(
        self,
        store: ExpertStore,
        pool: SlotPool,
        policy: str = "lru",
        *,
        num_io_threads: int = 4,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown cache policy {policy!r}; known: {', '.join(sorted(POLICIES))}")
        if pool.slot_nbytes < store.record_nbytes:
            raise ValueError(f"slots of {pool.slot_nbytes} bytes cannot hold records of {store.record_nbytes}")
        self._store = store
        self._pool = pool
        self._policy: Policy = POLICIES[policy](pool.num_slots)
        self._transfer = TransferEngine(store, num_io_threads)
        self._clock = clock
        self._entries: dict[ExpertKey, _Entry] = {}
        self._changed = threading.Condition()  # guards all of it; notified when an expert arrives or is unpinned
        self._counters: dict[Phase, _PhaseCounters] = {"prefill": _PhaseCounters(), "decode": _PhaseCounters()}
        self._num_fetches = self._num_evictions = self._num_waves = 0

    def acquire(self, keys: Sequence[ExpertKey], phase: Phase = "decode") -> Lease:
        """Lease distinct experts for one layer call; returns at once, with the misses on their way."""
        lease = Lease(self, (), phase)
        counters = self._counters[phase]
        with self._changed:
            counters.queries += len(keys)
            missing = []
            for key in keys:  # pin what is here first, so that no miss evicts it
                entry = self._entries.get(key)
                if entry is None:
                    missing.append(key)
                    continue
                self._policy.touch(key)
                if entry.ready:
                    entry.pins += 1
                    lease._held.append(entry)
                    lease._found.append((key, entry.slot))
                else:
                    counters.joined += 1
                    self._pin(lease, entry)
            counters.hits += len(lease._found)
            if missing:
                lease._waiting = missing
                self._load_waiting(lease)
                self._num_waves += bool(lease._waiting)
        return lease

    def _pin(self, lease: Lease, entry: _Entry) -> None:
        entry.pins += 1
        lease._held.append(entry)
        lease._awaited.append(entry)

    def _load_waiting(self, lease: Lease) -> None:
        """Give slots to the lease's waiting experts, as many as there are."""
        for i, key in enumerate(lease._waiting):
            entry = self._entries.get(key)  # another lease may have asked for it since
            if entry is None:
                slot = self._take_slot()
                if slot is None:
                    del lease._waiting[:i]
                    return
                entry = self._entries[key] = _Entry(key, slot)
                self._policy.insert(key)
                self._num_fetches += 1
                self._transfer.submit(key, self._pool.buffer(slot), partial(self._arrived, entry))
            else:
                self._policy.touch(key)
            self._pin(lease, entry)
        lease._waiting.clear()

    def _take_slot(self) -> int | None:
        slot = self._pool.take()
        if slot is None:
            key = self._policy.victim(self._evictable)
            if key is not None:
                self._policy.remove(key)
                slot = self._entries.pop(key).slot
                self._num_evictions += 1
        return slot

    def _evictable(self, key: ExpertKey) -> bool:
        entry = self._entries[key]
        return entry.ready and entry.pins == 0

    def _arrived(self, entry: _Entry, error: ExpertReadError | None) -> None:
        with self._changed:
            if error is None:
                entry.ready = True
            else:
                entry.error = error
                self._policy.remove(entry.key)
                del self._entries[entry.key]
                self._pool.give(entry.slot)
            self._changed.notify_all()

    def _next_batch(self, lease: Lease) -> list[tuple[ExpertKey, int]]:
        stalled_from: float | None = None
        with self._changed:
            while True:
                if lease._waiting:  # what was handed out is computed by now: its slots serve the next wave
                    self._unpin_computed(lease)
                    self._load_waiting(lease)
                for entry in lease._awaited:
                    if entry.error is not None:
                        raise ExpertReadError(entry.key, entry.error.why) from entry.error
                ready = [entry for entry in lease._awaited if entry.ready]
                if ready:
                    lease._awaited = [entry for entry in lease._awaited if not entry.ready]
                    break
                if stalled_from is None:
                    stalled_from = self._clock()
                self._changed.wait()
            if stalled_from is not None:
                self._counters[lease._phase].stall_s += self._clock() - stalled_from
        return [(entry.key, entry.slot) for entry in ready]

    def _unpin_computed(self, lease: Lease) -> None:
        awaited = {id(entry) for entry in lease._awaited}
        for entry in lease._held:
            if id(entry) not in awaited:
                entry.pins -= 1
        if len(lease._held) != len(lease._awaited):
            lease._held = list(lease._awaited)
            self._changed.notify_all()

    def _release(self, lease: Lease) -> None:
        with self._changed:
            for entry in lease._held:
                entry.pins -= 1
            lease._held.clear()
            lease._awaited.clear()
            lease._waiting.clear()
            self._changed.notify_all()

    def stats(self) -> CacheStats:
        """A snapshot of the counters and gauges."""
        with self._changed:
            return CacheStats(
                prefill=self._counters["prefill"].snapshot(),
                decode=self._counters["decode"].snapshot(),
                fetches=self._num_fetches,
                fetched_nbytes=self._transfer.num_reads * self._store.record_nbytes,
                read_s=self._transfer.read_s,
                read_retries=self._transfer.num_retries,
                read_errors=self._transfer.num_errors,
                evictions=self._num_evictions,
                waves=self._num_waves,
                num_slots=self._pool.num_slots,
                num_slots_used=self._pool.num_slots - self._pool.num_free,
                slot_nbytes=self._pool.slot_nbytes,
            )

    def resident(self) -> frozenset[ExpertKey]:
        """The experts that are ready in the top tier now."""
        with self._changed:
            return frozenset(key for key, entry in self._entries.items() if entry.ready)

    def check_integrity(self, *, idle: bool = True) -> None:
        """Raise `AssertionError` if an invariant is broken; `idle`: no lease and no transfer is under way."""
        with self._changed:
            used = [entry.slot for entry in self._entries.values()]
            free = self._pool.free_slots()
            problems = {
                "a slot holds two experts": len(set(used)) != len(used),
                "a slot is both free and used": bool(free & set(used)),
                "free + used is not all": len(free) + len(used) != self._pool.num_slots,
                "a pin count is negative": any(entry.pins < 0 for entry in self._entries.values()),
                "an expert is still pinned": idle and any(entry.pins for entry in self._entries.values()),
                "an expert is still loading": idle and not all(entry.ready for entry in self._entries.values()),
            }
        broken = [name for name, is_broken in problems.items() if is_broken]
        if broken:
            raise AssertionError("; ".join(broken))

    def close(self) -> None:
        """Finish transfers under way and end the I/O threads."""
        self._transfer.close()
