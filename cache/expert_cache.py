"""Which experts are in the top tier, who is using them, and which are on their way. Moves no bytes itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertStore
from cache.expert_table import ExpertTable
from cache.host_tier import HostTier
from cache.lease import Lease, Phase
from cache.oracle import OracleSampler
from cache.pinned_tier import PinnedTier
from cache.policies import POLICIES
from cache.policies.policy import Policy
from cache.residents import Residents, Taken
from cache.slot_pool import SlotPool
from cache.stats import CacheStats
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
        if isinstance(policy, str):
            policy = POLICIES[policy](pool.num_slots, layers, num_experts)
        if transfer is None:
            source = host if isinstance(host, HostTier) else store
            transfer = TransferEngine(source, num_io_threads, link_bandwidth=link_bandwidth)
        self._transfer: Transfer = transfer
        self._policy: Policy = policy
        self._clock = clock
        self._changed = arrival or threading.Condition()  # guards all of it
        self._residents = Residents(
            store.header.keys,
            pool,
            policy,
            transfer,
            record_nbytes=store.record_nbytes,
            changed=self._changed,
            clock=clock,
        )
        self._books = self._residents.books
        entries = self._residents.entries
        self._oracle = OracleSampler(pool.num_slots, entries, clock) if not self.holds_all else None

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
        lease = Lease(self._residents, phase)
        counters = self._books.phases[phase]
        now = self._clock()
        with self._changed:
            self._transfer.poll()
            counters.queries += len(keys)
            self._books.unique_experts.add(len(keys))
            if self._books.lifetimes.is_due():
                self._books.lifetimes.used(self._residents.entries, keys, now)
            num_hits = lease.pin_found(keys, now)
            counters.hits += num_hits
            if self._oracle is not None:
                self._oracle.saw(keys, num_hits)
            lease.fetch()
        return lease

    def observe(
        self, layer: int, requests: Sequence[int], chosen: Sequence[Sequence[int]], *, is_prefill: bool
    ) -> None:
        """A layer call begins: each token's request, and the experts it is routed to. For the policy."""
        with self._changed:
            self._policy.observe(layer, requests, chosen, is_prefill)

    def will_use(self, keys: Sequence[Sequence[ExpertKey]]) -> None:
        """A step begins that is sure to use these, of each of its layers. For the policy."""
        if not self.holds_all:
            with self._changed:
                self._policy.will_use(keys)

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
        residents = self._residents
        num_issued = 0
        soon = {key for key, _ in wanted}

        def is_idle(key: ExpertKey) -> bool:
            return residents.evictable(key) and key not in soon and key not in keep

        with self._changed:
            self._transfer.poll()
            counters = self._books.prefetched(distance)
            for key, benefit in wanted:
                if key in residents.entries:
                    continue
                taken = residents.take(is_idle, "prefetch")
                if taken is None:
                    break
                residents.ahead[key] = residents.load(key, taken, benefit=benefit, distance=distance)
                counters.issued += 1
                num_issued += 1
            self._transfer.send()
        return num_issued

    def cancel_prefetches(self, layer: int, but: Collection[ExpertKey] = frozenset()) -> int:
        """Give up the prefetches for a layer that have not begun, all `but` some; -> how many."""
        with self._changed:
            ahead = self._residents.ahead
            stale = [e for key, e in ahead.items() if key.layer == layer and key not in but and not e.ready]
            return sum(self._residents.cancel(entry) for entry in stale)

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
            return [key for key in keys if key not in self._residents.entries]

    def keep(self, keys: Collection[ExpertKey]) -> None:
        """Evict none of these from now on, and whatever was kept before again; raises `ValueError` for too many."""
        most = len(self._store) if self.holds_all else self._pool.num_slots // 2
        if len(set(keys)) > most:
            raise ValueError(f"at most {most} experts can be kept, half of the {self._pool.num_slots} slots")
        with self._changed:
            self._residents.kept = frozenset(keys)

    def warm(self, keys: Sequence[ExpertKey]) -> int:
        """Begin to read those that are not here, into free slots, and for kept ones into others; -> how many."""
        residents = self._residents
        num_begun = 0
        with self._changed:
            self._transfer.poll()
            for key in keys:
                if key in residents.entries:
                    continue
                slot = self._pool.take()
                taken: Taken | None = None if slot is None else (slot, None)
                if taken is None and key in residents.kept:
                    taken = residents.take(residents.evictable, "demand")
                if taken is None:
                    break
                residents.load(key, taken, benefit=0.0)
                num_begun += 1
            self._transfer.send()
        return num_begun

    def reset(self) -> int:
        """Forget every expert that is neither in use, nor on its way, nor kept; -> how many."""
        with self._changed:
            self._transfer.poll()
            residents = self._residents
            idle = [entry for entry in residents.entries.values() if residents.evictable(entry.key)]
            for entry in idle:
                residents.discard(entry)
            return len(idle)

    def stats(self) -> CacheStats:
        """A snapshot of the counters and gauges."""
        with self._changed:
            self._transfer.poll()
            self._residents.counts.age(self._residents.entries.values())
            return self._books.snapshot(self._pool, self._transfer, self._host, self._oracle)

    def resident(self) -> frozenset[ExpertKey]:
        """The experts that are ready in the top tier now."""
        with self._changed:
            self._transfer.poll()
            return frozenset(key for key, entry in self._residents.entries.items() if entry.ready)

    def table(self) -> ExpertTable:
        """Of each expert how often it was asked for, and where it is. Takes a millisecond for 10,000 experts."""
        below = self._host.keys() if self._host is not None else ()
        with self._changed:
            self._transfer.poll()
            return self._residents.counts.table(self._residents.entries.values(), below)

    def check_integrity(self, *, idle: bool = True) -> None:
        """Raise `AssertionError` if an invariant is broken; `idle`: no lease and no transfer is under way."""
        with self._changed:
            self._transfer.poll()
            self._residents.check_integrity(idle=idle)

    def close(self) -> None:
        """Give up prefetches, finish transfers under way and end the I/O threads."""
        with self._changed:
            self._residents.close()
        self._transfer.close()
