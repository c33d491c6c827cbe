"""How long experts stay in the top tier, lie there unused before they go, and are wanted again. Plain numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from cache.expert_key import ExpertKey
from cache.histogram import Histogram
from cache.lease import Entry
from cache.stats import HELD_S

_ONE_IN = 16  # layer calls whose experts' reuse is looked at


class Lifetimes:
    """Told of evictions and of a random sample of layer calls, so that each use is as likely to be looked at."""

    def __init__(self) -> None:
        self.residency_s = Histogram(HELD_S)
        self.idle_s = Histogram(HELD_S)
        self.reuse_gap_s = Histogram(HELD_S)
        self._random = random.Random(0).random
        self._gone: dict[ExpertKey, float] = {}  # when what was evicted was last used

    def is_due(self) -> bool:
        """Whether `used` is to be told of this layer call."""
        return self._random() * _ONE_IN < 1.0

    def used(self, entries: Mapping[ExpertKey, Entry], keys: Sequence[ExpertKey], now: float) -> None:
        """A layer call asks for these experts; before their entries are told so."""
        for key in keys:
            entry = entries.get(key)
            used_at = entry.used_at if entry is not None else self._gone.get(key)
            if used_at is None and entry is not None:  # read ahead, and not asked for since
                used_at = self._gone.get(key)
            if used_at is not None:
                self.reuse_gap_s.add(now - used_at)

    def evicted(self, entry: Entry, now: float) -> None:
        """Its slot is given to another."""
        self.residency_s.add(now - entry.arrived_at)
        self.idle_s.add(now - (entry.arrived_at if entry.used_at is None else max(entry.used_at, entry.arrived_at)))
        if entry.used_at is not None:
            self._gone[entry.key] = entry.used_at
