"""What the expert cache counts while it works, and the snapshot of it. Changes nothing in the cache."""

from __future__ import annotations

from cache.histogram import SizeHistogram
from cache.host_tier import HostTier
from cache.lease import Entry, Phase
from cache.lifetimes import Lifetimes
from cache.oracle import OracleSampler
from cache.pinned_tier import PinnedTier
from cache.slot_pool import SlotPool
from cache.stats import (
    UNIQUE_EXPERTS,
    CacheStats,
    EvictionReason,
    OracleStats,
    PhaseCounters,
    PhaseStats,
    PrefetchCounters,
    Source,
)
from cache.transfer import Transfer


class CacheBooks:
    """Kept under the cache's lock."""

    def __init__(self, record_nbytes: int) -> None:
        self._record_nbytes = record_nbytes
        self.phases: dict[Phase, PhaseCounters] = {"prefill": PhaseCounters(), "decode": PhaseCounters()}
        self.num_waves = 0
        self.num_on_cpu = 0  # experts that were not on the device, and computed where they lay
        self.unique_experts = SizeHistogram(UNIQUE_EXPERTS)
        self.lifetimes = Lifetimes()
        self._below: dict[Phase, PhaseCounters] = {"prefill": PhaseCounters(), "decode": PhaseCounters()}
        self._prefetched: dict[int, PrefetchCounters] = {}  # by layers ahead
        self._num_used_ahead = self._num_late = 0
        self._evictions: dict[EvictionReason, int] = {"demand": 0, "prefetch": 0}

    @property
    def stall_s(self) -> float:
        """Time in which compute waited for experts, in all."""
        return sum(counters.stall_s for counters in self.phases.values())

    def prefetched(self, distance: int) -> PrefetchCounters:
        """Of what was read so many layers ahead."""
        return self._prefetched.setdefault(distance, PrefetchCounters())

    def got_prefetched(self, distance: int, *, is_late: bool) -> None:
        """What was read ahead is asked for the first time."""
        if is_late:
            self._num_late += 1
            self._prefetched[distance].late += 1
        else:
            self._num_used_ahead += 1
            self._prefetched[distance].useful += 1

    def arrived(self, entry: Entry, now: float) -> None:
        """A record is in place."""
        entry.arrived_at = now
        if entry.phase is not None:
            assert entry.ticket is not None
            counters = self._below[entry.phase]
            counters.queries += 1
            counters.hits += entry.ticket.link == "host"

    def evicted(self, entry: Entry, reason: EvictionReason, now: float) -> None:
        """A record makes room for another."""
        if entry.distance is not None:
            self._prefetched[entry.distance].wasted += 1
        self._evictions[reason] += 1
        self.lifetimes.evicted(entry, now)

    def snapshot(
        self, pool: SlotPool, transfer: Transfer, host: HostTier | PinnedTier | None, oracle: OracleSampler | None
    ) -> CacheStats:
        below = {phase: counters.snapshot() for phase, counters in self._below.items()}
        residency_s, idle_s, reuse_gap_s = self.lifetimes.snapshot()
        num_hits = sum(counters.hits for counters in self.phases.values())
        num_from_host = sum(counters.hits for counters in below.values())
        sources: dict[Source, int] = {
            "top": num_hits - self._num_used_ahead,
            "prefetch": self._num_used_ahead + self._num_late,
            "host": num_from_host,
            "disk": sum(counters.queries for counters in below.values()) - num_from_host,
            "cpu_compute": self.num_on_cpu,
        }
        return CacheStats(
            prefill=self.phases["prefill"].snapshot(),
            decode=self.phases["decode"].snapshot(),
            fetches=transfer.num_reads,
            fetched_nbytes=transfer.num_reads * self._record_nbytes,
            fetched_ahead_nbytes=transfer.num_ahead * self._record_nbytes,
            read_s=transfer.read_s,
            read_retries=transfer.num_retries,
            read_errors=transfer.num_errors,
            evictions=sum(self._evictions.values()),
            prefetch={distance: c.snapshot() for distance, c in sorted(self._prefetched.items())},
            bandwidth=transfer.bandwidth or 0.0,
            latency_s=transfer.latency_s,
            depth=transfer.depth,
            host_hits=host.num_hits if host is not None else 0,
            host_slots=host.num_slots if host is not None else 0,
            host_slots_used=host.num_used if host is not None else 0,
            waves=self.num_waves,
            num_slots=pool.num_slots,
            num_slots_used=pool.num_slots - pool.num_free,
            slot_nbytes=pool.slot_nbytes,
            sources=sources,
            evictions_for=dict(self._evictions),
            links=transfer.link_stats(),
            host_prefill=below["prefill"] if host is not None else PhaseStats(),
            host_decode=below["decode"] if host is not None else PhaseStats(),
            residency_s=residency_s,
            idle_s=idle_s,
            reuse_gap_s=reuse_gap_s,
            unique_experts=self.unique_experts.snapshot(),
            oracle=oracle.stats if oracle is not None else OracleStats(),
        )
