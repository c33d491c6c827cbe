"""Counters of the expert cache. Plain numbers: knows no tensors and no metrics library."""

from __future__ import annotations

import msgspec


class PhaseStats(msgspec.Struct, frozen=True, kw_only=True):
    """Totals for the steps of one phase. A query is one expert asked for by one layer in one step."""

    queries: int = 0
    hits: int = 0  # resident when asked for
    joined: int = 0  # already on its way when asked for
    stall_s: float = 0.0  # time in which compute waited for experts


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. `prefill` counts the steps with a prompt chunk in them, `decode` the pure decode steps."""

    prefill: PhaseStats = PhaseStats()
    decode: PhaseStats = PhaseStats()
    fetches: int = 0  # records read from disk
    fetched_nbytes: int = 0
    read_s: float = 0.0  # summed over I/O threads
    read_retries: int = 0
    read_errors: int = 0
    evictions: int = 0
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
