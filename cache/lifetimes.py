"""How long experts stay in the top tier, lie there unused before they go, and are wanted again. Plain numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from cache.expert_key import ExpertKey
from cache.histogram import Histogram, HistogramStats
from cache.lease import Entry
from cache.stats import HELD_S

_ONE_IN = 16  # layer calls whose experts' reuse is looked at
_TOGETHER = 512  # evictions that are counted at once


class Lifetimes:
    """Told of evictions and of a random sample of layer calls, so that each use is as likely to be looked at."""

    def __init__(self) -> None:
        self._residency_s = Histogram(HELD_S)
        self._idle_s = Histogram(HELD_S)
        self._reuse_gap_s = Histogram(HELD_S)
        self._evicted: list[tuple[Entry, float]] = []  # not counted yet, and when
        self._random = random.Random(0).random
        self._gone: dict[ExpertKey, float] = {}  # when what was evicted was last used

    def is_due(self) -> bool:
        """Whether `used` is to be told of this layer call."""
        return self._random() * _ONE_IN < 1.0

    def used(self, entries: Mapping[ExpertKey, Entry], keys: Sequence[ExpertKey], now: float) -> None:
        """A layer call asks for these experts; before their entries are told so."""
        self._count_evicted()
        for key in keys:
            entry = entries.get(key)
            used_at = entry.used_at if entry is not None else self._gone.get(key)
            if used_at is None and entry is not None:  # read ahead, and not asked for since
                used_at = self._gone.get(key)
            if used_at is not None:
                self._reuse_gap_s.add(now - used_at)

    def evicted(self, entry: Entry, now: float) -> None:
        """Its slot is given to another, and the entry changes no more."""
        self._evicted.append((entry, now))
        if len(self._evicted) >= _TOGETHER:
            self._count_evicted()

    def snapshot(self) -> tuple[HistogramStats, HistogramStats, HistogramStats]:
        """Seconds from arrival to eviction, from the last use to eviction, and from use to use."""
        self._count_evicted()
        return self._residency_s.snapshot(), self._idle_s.snapshot(), self._reuse_gap_s.snapshot()

    def _count_evicted(self) -> None:
        evicted = self._evicted
        if not evicted:
            return
        self._residency_s.add_all([now - entry.arrived_at for entry, now in evicted])
        self._idle_s.add_all([now - max(entry.used_at or entry.arrived_at, entry.arrived_at) for entry, now in evicted])
        self._gone.update((entry.key, entry.used_at) for entry, _ in evicted if entry.used_at is not None)
        evicted.clear()
