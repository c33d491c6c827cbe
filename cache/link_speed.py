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


class _Samples:
    """Bytes over seconds of the last samples, the newest weighing most.

    Not an average of their rates: reads that end together, in next to no time after the others, would count for more
    than the link can do.
    """

    def __init__(self) -> None:
        self.average: float | None = None
        self._nbytes = 0  # of the sample that is being taken
        self._busy_s = 0.0
        self._past: tuple[float, float] | None = None  # decayed bytes and seconds

    def add(self, nbytes: int, busy_s: float) -> None:
        self._nbytes += nbytes
        self._busy_s += busy_s
        if self._nbytes < SAMPLE_NBYTES or self._busy_s <= 0:
            return
        now = (float(self._nbytes), self._busy_s)
        past = self._past or now
        nbytes_of, seconds_of = self._past = (
            past[0] + WEIGHT * (now[0] - past[0]),
            past[1] + WEIGHT * (now[1] - past[1]),
        )
        self.average = nbytes_of / seconds_of
        self._nbytes, self._busy_s = 0, 0.0


class Rate:
    """Bytes per second of the time in which something is under way."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._samples = _Samples()
        self._clock = clock
        self._since: float | None = None

    @property
    def average(self) -> float | None:
        """None before the first sample."""
        return self._samples.average

    def begin(self) -> None:
        if self._since is None:
            self._since = self._clock()

    def add(self, nbytes: int, *, is_idle: bool) -> None:
        now = self._clock()
        assert self._since is not None
        self._samples.add(nbytes, now - self._since)
        self._since = None if is_idle else now


class BusyRate:
    """As `Rate`, of reads that are told of when they have ended, in that order: several links share the threads."""

    def __init__(self) -> None:
        self._samples = _Samples()
        self._until = float("-inf")  # all before is counted

    @property
    def average(self) -> float | None:
        """None before the first sample."""
        return self._samples.average

    def add(self, nbytes: int, began: float, ended: float) -> None:
        self._samples.add(nbytes, max(0.0, ended - max(began, self._until)))
        self._until = max(self._until, ended)


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
