"""Counters of the expert cache. Plain numbers: knows no tensors and no metrics library."""

from __future__ import annotations

from typing import Literal

import msgspec

from cache.histogram import Histogram, HistogramStats
from cache.link_speed import BusyRate

Link = Literal["disk", "host"]  # where a record comes up from
Source = Literal["top", "prefetch", "host", "disk", "cpu_compute"]
EvictionReason = Literal["demand", "prefetch"]

READ_S = (
    *(50e-6, 100e-6, 250e-6, 500e-6, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
HELD_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)
RECALL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
UNIQUE_EXPERTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


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
    recall: HistogramStats = HistogramStats()  # of each such layer call: share of its experts foretold, by RECALL


class LinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """Reads over one link."""

    demand_nbytes: int = 0  # somebody waited when the read began
    prefetch_nbytes: int = 0
    demand_s: HistogramStats = HistogramStats()  # from a read's begin until its records are in place, by READ_S
    prefetch_s: HistogramStats = HistogramStats()
    bandwidth: float = 0.0  # bytes/s while it works, averaged; 0 before the first sample


class OracleStats(msgspec.Struct, frozen=True, kw_only=True):
    """Of the same sampled windows: what was asked for, was there, and would have been there had the evictions known
    the future."""

    queries: int = 0
    hits: int = 0
    oracle_hits: int = 0


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
    sources: dict[Source, int] = msgspec.field(default_factory=dict)  # of the experts that layer calls got
    evictions_for: dict[EvictionReason, int] = msgspec.field(default_factory=dict)
    links: dict[Link, LinkStats] = msgspec.field(default_factory=dict)
    host_prefill: PhaseStats = PhaseStats()  # queries of the host tier: what the top tier had to wait for, and its hits
    host_decode: PhaseStats = PhaseStats()
    residency_s: HistogramStats = HistogramStats()  # from an expert's arrival to its eviction, by HELD_S
    idle_s: HistogramStats = HistogramStats()  # from its last use to its eviction, by HELD_S
    reuse_gap_s: HistogramStats = HistogramStats()  # from one use to the next, of a sample of all uses, by HELD_S
    unique_experts: HistogramStats = HistogramStats()  # of each layer call, by UNIQUE_EXPERTS
    oracle: OracleStats = OracleStats()

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

    __slots__ = ("cancelled", "issued", "late", "predicted", "recall", "routed", "useful", "wasted")

    def __init__(self) -> None:
        self.issued = self.useful = self.late = self.wasted = self.cancelled = self.predicted = self.routed = 0
        self.recall = Histogram(RECALL)

    def foretold(self, num_predicted: int, num_routed: int) -> None:
        """Of a layer call's experts so many had been predicted."""
        self.predicted += num_predicted
        self.routed += num_routed
        self.recall.add(num_predicted / max(1, num_routed))

    def snapshot(self) -> PrefetchStats:
        counts = {name: getattr(self, name) for name in self.__slots__ if name != "recall"}
        return PrefetchStats(**counts, recall=self.recall.snapshot())


class LinkCounters:
    """What `LinkStats` is a snapshot of. Under its transfer engine's lock."""

    def __init__(self) -> None:
        self._nbytes = {True: 0, False: 0}  # of what was waited for, and not
        self._seconds = {True: Histogram(READ_S), False: Histogram(READ_S)}
        self._busy = BusyRate()

    def add_nbytes(self, nbytes: int, *, is_demand: bool) -> None:
        """So much has come."""
        self._nbytes[is_demand] += nbytes

    def add_read(self, nbytes: int, began: float, ended: float, *, is_demand: bool) -> None:
        """A read has ended, in which that came."""
        self._seconds[is_demand].add(ended - began)
        self._busy.add(nbytes, began, ended)

    def snapshot(self) -> LinkStats:
        return LinkStats(
            demand_nbytes=self._nbytes[True],
            prefetch_nbytes=self._nbytes[False],
            demand_s=self._seconds[True].snapshot(),
            prefetch_s=self._seconds[False].snapshot(),
            bandwidth=self._busy.average or 0.0,
        )
