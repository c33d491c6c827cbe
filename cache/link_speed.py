"""What a link was measured to do: its bandwidth, and how many reads at once it takes to reach it."""

from __future__ import annotations

import time
from collections.abc import Callable

WEIGHT = 0.2  # of a new sample in the averages
_DEPTHS = (2, 4, 8)  # reads under way that are tried, in this order
TRIAL_NBYTES = 32 * 1024**2  # read with each of them, while there is a queue
WORTH = 1.05  # a greater depth must be faster by that factor
SAMPLE_NBYTES = 4 * 1024**2  # read between two samples of the bandwidth


def depths_to_try(max_depth: int) -> list[int]:
    """Ascending, none above `max_depth`."""
    return [depth for depth in _DEPTHS if depth <= max_depth] or [max_depth]


class Rate:
    """Bytes per second of the time in which something is under way."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.average: float | None = None
        self._clock = clock
        self._nbytes = 0
        self._busy_s = 0.0
        self._since: float | None = None

    def begin(self) -> None:
        if self._since is None:
            self._since = self._clock()

    def add(self, nbytes: int, *, is_idle: bool) -> None:
        now = self._clock()
        assert self._since is not None
        self._busy_s += now - self._since
        self._since = None if is_idle else now
        self._nbytes += nbytes
        if self._nbytes >= SAMPLE_NBYTES and self._busy_s > 0:
            rate = self._nbytes / self._busy_s
            self.average = rate if self.average is None else self.average + WEIGHT * (rate - self.average)
            self._nbytes, self._busy_s = 0, 0.0


class BusyRate:
    """As `Rate`, of reads that are told of when they have ended, in that order: several links share the threads."""

    def __init__(self) -> None:
        self.average: float | None = None
        self._nbytes = 0
        self._busy_s = 0.0
        self._until = float("-inf")  # all before is counted

    def add(self, nbytes: int, began: float, ended: float) -> None:
        self._busy_s += max(0.0, ended - max(began, self._until))
        self._until = max(self._until, ended)
        self._nbytes += nbytes
        if self._nbytes >= SAMPLE_NBYTES and self._busy_s > 0:
            rate = self._nbytes / self._busy_s
            self.average = rate if self.average is None else self.average + WEIGHT * (rate - self.average)
            self._nbytes, self._busy_s = 0, 0.0


class DepthTrials:
    """Tries each depth while there is a queue, then keeps the smallest that is about as fast as the fastest."""

    def __init__(self, max_depth: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._left = depths_to_try(max_depth)
        self._rates: dict[int, float] = {}
        self.depth = self._left.pop(0)
        self._nbytes = 0
        self._since: float | None = None

    def add(self, nbytes: int, *, has_queue: bool) -> None:
        if self.depth in self._rates:
            return  # settled
        now = self._clock()
        if self._since is None or not has_queue:
            self._since, self._nbytes = (now if has_queue else None), 0
            return
        self._nbytes += nbytes
        if self._nbytes < TRIAL_NBYTES:
            return
        self._rates[self.depth] = self._nbytes / (now - self._since)
        if self._left:
            self.depth = self._left.pop(0)
        else:
            fastest = max(self._rates.values())
            self.depth = min(depth for depth, rate in self._rates.items() if rate * WORTH >= fastest)
        self._since, self._nbytes = None, 0
