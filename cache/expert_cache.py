"""Which experts are in the top tier, who is using them, and which are on their way. Moves no bytes itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

from cache.cache_books import CacheBooks
from cache.expert_counts import ExpertCounts
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError, ExpertStore
from cache.expert_table import ExpertTable
from cache.host_tier import HostTier
from cache.lease import Entry, Lease, Phase
from cache.oracle import OracleSampler
from cache.pinned_tier import PinnedTier
from cache.policies import POLICIES
from cache.policies.policy import Policy
from cache.slot_pool import SlotPool
from cache.stats import CacheStats, EvictionReason
from cache.transfer import Transfer, TransferEngine


class ExpertCache:
    """Leases experts to layer calls, fetching the missing ones through the transfer engine. Thread-safe.

    Invariants (`check_integrity`): a slot holds one expert, an expert has at most one slot, free + used == all, a
    pinned or loading expert is never evicted.
    """

    def __init__(
        self,
        store: ExpertStore,
        pool: SlotPool,
        policy: str | Policy = "lru",
        *,
        host: HostTier | PinnedTier | None = None,
        num_io_threads: int = 4,
        link_bandwidth: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        transfer: Transfer | None = None,
        arrival: threading.Condition | None = None,
    ) -> None:
        """`host`: a tier over the store that answers first. `link_bandwidth`: see `TransferEngine`.

        `transfer` is passed where slots are on a device; with `clock` and `arrival`, which is waited on, where time
        is simulated.
        """
        if isinstance(policy, str) and policy not in POLICIES:
            raise ValueError(f"unknown cache policy {policy!r}; known: {', '.join(sorted(POLICIES))}")
        if pool.slot_nbytes < store.record_nbytes:
            raise ValueError(f"slots of {pool.slot_nbytes} bytes cannot hold records of {store.record_nbytes}")
        self._store = store
        self._pool = pool
        self._host = host
        layers = sorted({key.layer for key in store.header.keys})
        num_experts = 1 + max(key.expert for key in store.header.keys)
        self._policy: Policy = (
            POLICIES[policy](pool.num_slots, layers, num_experts) if isinstance(policy, str) else policy
        )
        if transfer is None:
            source = host if isinstance(host, HostTier) else store
            transfer = TransferEngine(source, num_io_threads, link_bandwidth=link_bandwidth)
        self._transfer: Transfer = transfer
        self._clock = clock
        self._entries: dict[ExpertKey, Entry] = {}
        self._ahead: dict[ExpertKey, Entry] = {}  # prefetched and not asked for yet
        # guards all of it; notified when an expert arrives or is unpinned
        self._changed = arrival or threading.Condition()
        self._counts = ExpertCounts(store.header.keys, clock)
        self._books = CacheBooks(store.record_nbytes)
        self._oracle = OracleSampler(pool.num_slots, self._entries, clock) if not self.holds_all else None
        self._kept: frozenset[ExpertKey] = frozenset()
        self._is_closing = False

    @property
    def keys(self) -> Sequence[ExpertKey]:
        """All experts there are."""
        return self._store.header.keys

    @property
    def holds_all(self) -> bool:
        """Whether every expert has a slot, so that nothing is ever evicted."""
        return self._pool.num_slots >= len(self._store)

    @property
    def record_nbytes(self) -> int:
        return self._store.record_nbytes

    @property
    def transfer(self) -> Transfer:
        """What brings the records: its bandwidth, latency and queue."""
        return self._transfer

    @property
    def stall_s(self) -> float:
        """Time in which compute waited for experts, in all."""
        return self._books.stall_s

    def acquire(self, keys: Sequence[ExpertKey], phase: Phase = "decode") -> Lease:
        """Lease distinct experts for one layer call; returns at once, with the misses on their way."""
        lease = Lease(self, (), phase)
        counters = self._books.phases[phase]
        now = self._clock()
        with self._changed:
            self._transfer.poll()
            counters.queries += len(keys)
            self._books.unique_experts.add(len(keys))
            if self._books.lifetimes.is_due():
                self._books.lifetimes.used(self._entries, keys, now)
            missing = []
            for key in keys:  # pin what is here first, so that no miss evicts it
                entry = self._entries.get(key)
                if entry is None:
                    missing.append(key)
                    self._counts.missed(key)
                    continue
                if entry.distance is not None:
                    self._asked_for(entry)
                entry.used_at = now
                self._policy.touch(key)
                if entry.ready:
                    entry.hits += 1
                    entry.pins += 1
                    lease._held.append(entry)
                    lease._found.append((key, entry.slot))
                else:
                    counters.joined += 1
                    self._counts.missed(key)
                    self._join(lease, entry)
            counters.hits += len(lease._found)
            self._pool.handed_out(slot for _, slot in lease._found)
            if self._oracle is not None:
                self._oracle.saw(keys, len(lease._found))
            if missing:
                lease._waiting = missing
                self._load_waiting(lease)
                self._transfer.send()
                self._books.num_waves += bool(lease._waiting)
        return lease

    def observe(
        self, layer: int, requests: Sequence[int], chosen: Sequence[Sequence[int]], *, is_prefill: bool
    ) -> None:
        """A layer call begins: each token's request, and the experts it is routed to. For the policy."""
        with self._changed:
            self._policy.observe(layer, requests, chosen, is_prefill)

    def ended(self, request: int) -> None:
        """A request is over: the policy expects nothing of it any more."""
        with self._changed:
            self._policy.ended(request)

    def prefetch(
        self, wanted: Sequence[tuple[ExpertKey, float]], distance: int, keep: Collection[ExpertKey] = frozenset()
    ) -> int:
        """Bring up experts, with the benefit of each, that a layer `distance` ahead will ask for; -> reads issued.

        Nothing is evicted for them that is in use, on its way, one of them or in `keep`; with no slot nothing is read.
        """
        num_issued = 0
        stays = {key for key, _ in wanted}.union(keep)
        with self._changed:
            self._transfer.poll()
            counters = self._books.prefetched(distance)
            for key, benefit in wanted:
                if key in self._entries:
                    continue
                taken = self._take_slot(lambda other: self._evictable(other) and other not in stays, "prefetch")
                if taken is None:
                    break
                entry = self._ahead[key] = self._load(key, taken, benefit=benefit, distance=distance)
                assert entry.ticket is not None
                counters.issued += 1
                num_issued += 1
            self._transfer.send()
        return num_issued

    def cancel_prefetches(self, layer: int, but: Collection[ExpertKey] = frozenset()) -> int:
        """Give up the prefetches for a layer that have not begun, all `but` some; -> how many."""
        with self._changed:
            stale = [e for key, e in self._ahead.items() if key.layer == layer and key not in but and not e.ready]
            return sum(self._cancel(entry) for entry in stale)

    def foretold(self, distance: int, num_predicted: int, num_routed: int) -> None:
        """Count how many of a layer's routed experts had been predicted that many layers ahead."""
        with self._changed:
            self._books.prefetched(distance).foretold(num_predicted, num_routed)

    def step_ended(self, seconds: float) -> None:
        """A step of the engine took so long: a small share of that is spent on what an oracle would have kept."""
        if self._oracle is not None:
            self._oracle.step_ended(seconds)

    def computed_on_cpu(self, num_experts: int) -> None:
        """So many missing experts of a layer call were not asked for, but computed in the tier below."""
        with self._changed:
            self._books.num_on_cpu += num_experts

    def missing(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Those that are neither here nor on their way."""
        with self._changed:
            return [key for key in keys if key not in self._entries]

    def keep(self, keys: Collection[ExpertKey]) -> None:
        """Evict none of these from now on, and whatever was kept before again; raises `ValueError` for too many."""
        most = len(self._store) if self.holds_all else self._pool.num_slots // 2
        if len(set(keys)) > most:
            raise ValueError(f"at most {most} experts can be kept, half of the {self._pool.num_slots} slots")
        with self._changed:
            self._kept = frozenset(keys)

    def warm(self, keys: Sequence[ExpertKey]) -> int:
        """Begin to read those that are not here, into free slots, and for kept ones into others; -> how many."""
        num_begun = 0
        with self._changed:
            self._transfer.poll()
            for key in keys:
                if key in self._entries:
                    continue
                slot = self._pool.take()
                taken: tuple[int, ExpertKey | None] | None = None if slot is None else (slot, None)
                if taken is None and key in self._kept:
                    taken = self._take_slot(self._evictable, "demand")
                if taken is None:
                    break
                self._load(key, taken, benefit=0.0)
                num_begun += 1
            self._transfer.send()
        return num_begun

    def reset(self) -> int:
        """Forget every expert that is neither in use, nor on its way, nor kept; -> how many."""
        with self._changed:
            self._transfer.poll()
            idle = [entry for entry in self._entries.values() if self._evictable(entry.key)]
            for entry in idle:
                if entry.distance is not None:
                    self._books.prefetched(entry.distance).wasted += 1
                self._forget(entry)
                self._pool.give(entry.slot)
            return len(idle)

    def _asked_for(self, entry: Entry) -> None:
        assert entry.distance is not None
        self._books.got_prefetched(entry.distance, is_late=not entry.ready)
        if not entry.ready:
            assert entry.ticket is not None
            self._transfer.promote(entry.ticket)
        entry.distance = None
        del self._ahead[entry.key]

    def _cancel(self, entry: Entry) -> bool:
        assert entry.distance is not None
        assert entry.ticket is not None
        if not self._transfer.cancel(entry.ticket):
            return False
        self._books.prefetched(entry.distance).cancelled += 1
        self._forget(entry)
        self._pool.give(entry.slot)
        return True

    def _pin(self, lease: Lease, entry: Entry) -> None:
        entry.pins += 1
        lease._held.append(entry)
        lease._awaited.append(entry)

    def _join(self, lease: Lease, entry: Entry) -> None:
        """The lease waits for a read that is under way, and may have begun before it asked."""
        assert entry.ticket is not None
        entry.is_joined |= not entry.ready and not entry.ticket.is_queued
        self._pin(lease, entry)

    def _load_waiting(self, lease: Lease) -> None:
        """Give slots to the lease's waiting experts, as many as there are."""
        for i, key in enumerate(lease._waiting):
            entry = self._entries.get(key)  # another lease may have asked for it since
            if entry is None:
                taken = self._take_slot(self._evictable, "demand") or self._slot_of_a_prefetch()
                if taken is None:
                    del lease._waiting[:i]
                    return
                entry = self._load(key, taken, phase=lease._phase)
            else:
                if entry.distance is not None:
                    self._asked_for(entry)
                self._policy.touch(key)
                self._join(lease, entry)
                continue
            self._pin(lease, entry)
        lease._waiting.clear()

    def _load(
        self,
        key: ExpertKey,
        taken: tuple[int, ExpertKey | None],
        *,
        phase: Phase | None = None,
        benefit: float | None = None,
        distance: int | None = None,
    ) -> Entry:
        slot, evicted = taken
        entry = self._entries[key] = Entry(key, slot, distance, phase, self._clock())
        self._policy.insert(key)
        buffer = self._pool.buffer(slot)
        entry.ticket = self._transfer.submit(
            key, buffer, partial(self._arrived, entry), benefit=benefit, evicted=evicted
        )
        return entry

    def _take_slot(
        self, evictable: Callable[[ExpertKey], bool], reason: EvictionReason
    ) -> tuple[int, ExpertKey | None] | None:
        """A slot, and whose record it still holds."""
        slot = self._pool.take()
        if slot is not None:
            return slot, None
        key = self._policy.victim(evictable)
        if key is None:
            return None
        entry = self._entries[key]
        self._books.evicted(entry, reason, self._clock())
        self._forget(entry)
        return entry.slot, key

    def _slot_of_a_prefetch(self) -> tuple[int, ExpertKey | None] | None:
        """Demand goes before what is only foretold."""
        for entry in list(self._ahead.values()):
            if not entry.ready and self._cancel(entry):
                slot = self._pool.take()
                assert slot is not None
                return slot, None
        return None

    def _forget(self, entry: Entry) -> None:
        self._policy.remove(entry.key)
        self._counts.left(entry)
        del self._entries[entry.key]
        self._ahead.pop(entry.key, None)

    def _evictable(self, key: ExpertKey) -> bool:
        entry = self._entries[key]
        return entry.ready and entry.pins == 0 and key not in self._kept

    def _arrived(self, entry: Entry, error: ExpertReadError | None) -> None:
        with self._changed:
            if error is None:
                entry.ready = True
                self._books.arrived(entry, self._clock())
            elif entry.is_joined and entry.pins and not self._is_closing:  # no lease fails by what was read before it
                entry.is_joined = False
                entry.ticket = self._transfer.submit(
                    entry.key, self._pool.buffer(entry.slot), partial(self._arrived, entry)
                )
            else:
                entry.error = error
                if entry.distance is not None:
                    self._books.prefetched(entry.distance).wasted += 1
                self._forget(entry)
                self._pool.give(entry.slot)
            self._changed.notify_all()

    def _next_batch(self, lease: Lease) -> list[tuple[ExpertKey, int]]:
        stalled_from: float | None = None
        with self._changed:
            while True:
                if lease._waiting:  # what was handed out is computed by now: its slots serve the next wave
                    self._unpin_computed(lease)
                    self._load_waiting(lease)
                    self._transfer.send()
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
                self._books.phases[lease._phase].stall_s += self._clock() - stalled_from
            self._pool.handed_out(entry.slot for entry in ready)
        return [(entry.key, entry.slot) for entry in ready]

    def _unpin_computed(self, lease: Lease) -> None:
        awaited = {id(entry) for entry in lease._awaited}
        computed = [entry for entry in lease._held if id(entry) not in awaited]
        for entry in computed:
            entry.pins -= 1
        if computed:
            self._pool.handed_back(entry.slot for entry in computed)
            lease._held = list(lease._awaited)
            self._changed.notify_all()

    def _release(self, lease: Lease) -> None:
        with self._changed:
            self._pool.handed_back(entry.slot for entry in lease._held)
            for entry in lease._held:
                entry.pins -= 1
            lease._held.clear()
            lease._awaited.clear()
            lease._waiting.clear()
            self._changed.notify_all()

    def stats(self) -> CacheStats:
        """A snapshot of the counters and gauges."""
        with self._changed:
            self._transfer.poll()
            self._counts.age(self._entries.values())
            return self._books.snapshot(self._pool, self._transfer, self._host, self._oracle)

    def resident(self) -> frozenset[ExpertKey]:
        """The experts that are ready in the top tier now."""
        with self._changed:
            self._transfer.poll()
            return frozenset(key for key, entry in self._entries.items() if entry.ready)

    def table(self) -> ExpertTable:
        """Of each expert how often it was asked for, and where it is. Takes a millisecond for 10,000 experts."""
        below = self._host.keys() if self._host is not None else ()
        with self._changed:
            self._transfer.poll()
            return self._counts.table(self._entries.values(), below)

    def check_integrity(self, *, idle: bool = True) -> None:
        """Raise `AssertionError` if an invariant is broken; `idle`: no lease and no transfer is under way."""
        with self._changed:
            self._transfer.poll()
            used = [entry.slot for entry in self._entries.values()]
            free = self._pool.free_slots()
            problems = {
                "a slot holds two experts": len(set(used)) != len(used),
                "a slot is both free and used": bool(free & set(used)),
                "free + used is not all": len(free) + len(used) != self._pool.num_slots,
                "a pin count is negative": any(entry.pins < 0 for entry in self._entries.values()),
                "what is foretold has no slot": any(self._entries.get(k) is not e for k, e in self._ahead.items()),
                "an expert is still pinned": idle and any(entry.pins for entry in self._entries.values()),
                "an expert is still loading": idle and not all(entry.ready for entry in self._entries.values()),
            }
        broken = [name for name, is_broken in problems.items() if is_broken]
        if broken:
            raise AssertionError("; ".join(broken))

    def close(self) -> None:
        """Give up prefetches, finish transfers under way and end the I/O threads."""
        with self._changed:
            self._is_closing = True
            for entry in list(self._ahead.values()):
                if not entry.ready:
                    self._cancel(entry)
        self._transfer.close()
