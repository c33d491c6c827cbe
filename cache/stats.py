"""Counters of the expert cache. Plain numbers: knows no tensors and no metrics library."""

from __future__ import annotations

import msgspec


class PhaseStats(msgspec.Struct, frozen=True, kw_only=True):
    """Totals for the steps of one phase. A query is one expert asked for by one layer in one step."""

    queries: int = 0
    hits: int = 0  # resident when asked for
    joined: int = 0  # already on its way when asked for
    stall_s: float = 0.0  # time in which compute waited for experts


class PrefetchStats(msgspec.Struct, frozen=True, kw_only=True):
    """Records that were asked for before a layer call did, and what became of them."""

    issued: int = 0
    useful: int = 0  # in place when first asked for
    late: int = 0  # still on their way then
    wasted: int = 0  # evicted unused
    cancelled: int = 0  # given up before the read began
    predicted: int = 0  # routed experts that had been foretold, resident or not
    routed: int = 0  # routed experts of layer calls that something had been foretold of


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. `prefill` counts the steps with a prompt chunk in them, `decode` the pure decode steps."""

    prefill: PhaseStats = PhaseStats()
    decode: PhaseStats = PhaseStats()
    fetches: int = 0  # records read from disk
    fetched_nbytes: int = 0
    fetched_ahead_nbytes: int = 0  # of these, what was begun before anybody waited for it
    read_s: float = 0.0  # summed over I/O threads
    read_retries: int = 0
    read_errors: int = 0
    evictions: int = 0
    prefetch: dict[int, PrefetchStats] = msgspec.field(default_factory=dict)  # by layers ahead
    bandwidth: float = 0.0  # bytes/s of the link while it works, measured; 0 before the first sample
    latency_s: float = 0.0  # of one read, measured
    depth: int = 0  # reads under way at most
    host_hits: int = 0  # fetches that the host tier answered
    host_slots: int = 0
    host_slots_used: int = 0
    waves: int = 0  # layer calls whose experts did not fit at once
    num_slots: int = 0
    num_slots_used: int = 0
    slot_nbytes: int = 0

    @property
    def capacity_nbytes(self) -> int:
        return self.num_slots * self.slot_nbytes

    @property
    def used_nbytes(self) -> int:
        return self.num_slots_used * self.slot_nbytes


class PhaseCounters:
    """What `PhaseStats` is a snapshot of."""

    __slots__ = ("hits", "joined", "queries", "stall_s")

    def __init__(self) -> None:
        self.queries = self.hits = self.joined = 0
        self.stall_s = 0.0

    def snapshot(self) -> PhaseStats:
        return PhaseStats(queries=self.queries, hits=self.hits, joined=self.joined, stall_s=self.stall_s)


class PrefetchCounters:
    """What `PrefetchStats` is a snapshot of."""

    __slots__ = ("cancelled", "issued", "late", "predicted", "routed", "useful", "wasted")

    def __init__(self) -> None:
        self.issued = self.useful = self.late = self.wasted = self.cancelled = self.predicted = self.routed = 0

    def snapshot(self) -> PrefetchStats:
        return PrefetchStats(**{name: getattr(self, name) for name in self.__slots__})
