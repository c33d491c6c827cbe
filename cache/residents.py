"""Which expert has which slot, or is being read into it, and which makes room for another. Knows no leases."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from cache.cache_books import CacheBooks
from cache.expert_counts import ExpertCounts
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from cache.lease import Entry, Phase
from cache.policies.policy import Policy
from cache.slot_pool import SlotPool
from cache.stats import EvictionReason
from cache.transfer import Transfer

_WAVE_NBYTES = 1024**2  # that arrive are computed in one call: for less, calling costs more than it hides

Taken = tuple[int, ExpertKey | None]
"""A slot, and whose record it still holds."""


class Residents:
    """The table of what is in the top tier. All calls, and all that is read here, under the lock of `changed`."""

    def __init__(
        self,
        keys: Sequence[ExpertKey],
        pool: SlotPool,
        policy: Policy,
        transfer: Transfer,
        *,
        record_nbytes: int,
        changed: threading.Condition,
        clock: Callable[[], float],
    ) -> None:
        """`keys`: all experts there are. `changed`: notified when an expert arrives or is unpinned."""
        self.pool = pool
        self.policy = policy
        self.transfer = transfer
        self.changed = changed
        self.clock = clock
        self.entries: dict[ExpertKey, Entry] = {}
        self.ahead: dict[ExpertKey, Entry] = {}  # prefetched and not asked for yet
        self.kept: frozenset[ExpertKey] = frozenset()  # not to be evicted
        self.counts = ExpertCounts(keys, clock)
        self.books = CacheBooks(record_nbytes)
        self.wave = max(1, _WAVE_NBYTES // record_nbytes)  # experts that a layer waits for before it goes on, or all
        self._is_closing = False

    def evictable(self, key: ExpertKey) -> bool:
        """Whether one that has a slot can be made to leave it."""
        entry = self.entries[key]
        return entry.ready and entry.pins == 0 and key not in self.kept

    def asked_for(self, entry: Entry) -> None:
        """What was prefetched is wanted now."""
        assert entry.distance is not None
        self.books.got_prefetched(entry.distance, is_late=not entry.ready)
        if not entry.ready:
            assert entry.ticket is not None
            self.transfer.promote(entry.ticket)
        entry.distance = None
        del self.ahead[entry.key]

    def cancel(self, entry: Entry) -> bool:
        """Give up a prefetch; False: its read has begun."""
        assert entry.distance is not None
        assert entry.ticket is not None
        if not self.transfer.cancel(entry.ticket):
            return False
        self.books.prefetched(entry.distance).cancelled += 1
        self._drop(entry)
        return True

    def discard(self, entry: Entry) -> None:
        """Forget a record that is in place; its slot is free."""
        if entry.distance is not None:
            self.books.prefetched(entry.distance).wasted += 1
        self._drop(entry)

    def take(self, evictable: Callable[[ExpertKey], bool], reason: EvictionReason) -> Taken | None:
        """A free slot, or that of the expert which the policy lets go first."""
        slot = self.pool.take()
        if slot is not None:
            return slot, None
        key = self.policy.victim(evictable, sparing=reason == "prefetch")
        if key is None:
            return None
        entry = self.entries[key]
        self.books.evicted(entry, reason, self.clock())
        self._forget(entry)
        return entry.slot, key

    def take_on_demand(self) -> Taken | None:
        """As `take`; demand goes before what is only foretold, too."""
        return self.take(self.evictable, "demand") or self._slot_of_a_prefetch()

    def load(
        self,
        key: ExpertKey,
        taken: Taken,
        *,
        phase: Phase | None = None,
        benefit: float | None = None,
        distance: int | None = None,
    ) -> Entry:
        """Begin to read an expert into a slot. `benefit`: of a prefetch; None: somebody waits for it."""
        slot, evicted = taken
        entry = self.entries[key] = Entry(key, slot, distance, phase, self.clock())
        self.policy.insert(key)
        entry.ticket = self.transfer.submit(
            key, self.pool.buffer(slot), partial(self.arrived, entry), benefit=benefit, evicted=evicted
        )
        return entry

    def arrived(self, entry: Entry, error: ExpertReadError | None) -> None:
        """The transfer is done with it; may be told on any thread, which need not have the lock yet."""
        with self.changed:
            if error is None:
                entry.ready = True
                self.books.arrived(entry, self.clock())
            elif entry.is_joined and entry.pins and not self._is_closing:  # no lease fails by what was read before it
                entry.is_joined = False
                entry.ticket = self.transfer.submit(
                    entry.key, self.pool.buffer(entry.slot), partial(self.arrived, entry)
                )
            else:
                entry.error = error
                self.discard(entry)
            self.changed.notify_all()

    def check_integrity(self, *, idle: bool) -> None:
        """See `ExpertCache.check_integrity`."""
        used = [entry.slot for entry in self.entries.values()]
        free = self.pool.free_slots()
        problems = {
            "a slot holds two experts": len(set(used)) != len(used),
            "a slot is both free and used": bool(free & set(used)),
            "free + used is not all": len(free) + len(used) != self.pool.num_slots,
            "a pin count is negative": any(entry.pins < 0 for entry in self.entries.values()),
            "what is foretold has no slot": any(self.entries.get(k) is not e for k, e in self.ahead.items()),
            "an expert is still pinned": idle and any(entry.pins for entry in self.entries.values()),
            "an expert is still loading": idle and not all(entry.ready for entry in self.entries.values()),
        }
        broken = [name for name, is_broken in problems.items() if is_broken]
        if broken:
            raise AssertionError("; ".join(broken))

    def close(self) -> None:
        """Give up prefetches; what fails from now on is not read again."""
        self._is_closing = True
        for entry in list(self.ahead.values()):
            if not entry.ready:
                self.cancel(entry)

    def _slot_of_a_prefetch(self) -> Taken | None:
        for entry in list(self.ahead.values()):
            if not entry.ready and self.cancel(entry):
                slot = self.pool.take()
                assert slot is not None
                return slot, None
        return None

    def _drop(self, entry: Entry) -> None:
        self._forget(entry)
        self.pool.give(entry.slot)

    def _forget(self, entry: Entry) -> None:
        self.policy.remove(entry.key)
        self.counts.left(entry)
        del self.entries[entry.key]
        self.ahead.pop(entry.key, None)
