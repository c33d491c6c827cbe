"""The right to compute with experts: what a layer call holds while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from cache.transfer_queue import Ticket

if TYPE_CHECKING:
    from cache.expert_cache import ExpertCache

Phase = Literal["prefill", "decode"]


class Entry:
    """One expert that has a slot: still loading, ready, or failed (then it has left the table)."""

    __slots__ = (
        *("arrived_at", "distance", "error", "is_joined", "key", "phase", "pins", "ready", "slot", "ticket"),
        "hits",
        "used_at",
    )

    def __init__(
        self, key: ExpertKey, slot: int, distance: int | None = None, phase: Phase | None = None, now: float = 0.0
    ) -> None:
        """`phase`: of the lease that it is fetched for now; None: nobody waits for it yet."""
        self.key = key
        self.slot = slot
        self.distance = distance  # layers ahead that it was prefetched, until it is asked for
        self.phase = phase
        self.arrived_at = now
        self.used_at = None if phase is None else now  # None: never yet
        self.ticket: Ticket | None = None
        self.pins = 0
        self.hits = 0  # times that it was asked for while ready
        self.ready = False
        self.is_joined = False  # somebody asked for it after its read had begun
        self.error: ExpertReadError | None = None


class Lease:
    """The right to compute with some experts of one layer call. Iterate `batches`, then `release` (or use `with`).

    An expert is pinned from the moment it is found or given a slot until the lease ends, or, when the experts do not
    all fit, until it has been computed: the layer is then computed in waves. A lease that waits for a slot pins none
    that is computed, so leases of several threads cannot deadlock.
    """

    def __init__(self, cache: ExpertCache, keys: Sequence[ExpertKey], phase: Phase) -> None:
        self._cache = cache
        self._phase = phase
        self._held: list[Entry] = []  # pinned by this lease
        self._awaited: list[Entry] = []  # pinned by this lease, not handed out yet
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
