"""Counts in buckets: cheap to add to, small to send. Knows no metrics library."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import msgspec
import numpy as np


class HistogramStats(msgspec.Struct, frozen=True):
    """A snapshot. `counts[i]` values were at most bound i and above the one before it, the last ones above all bounds;
    empty before there is a value."""

    counts: list[int] = msgspec.field(default_factory=list)
    sum: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)


class Histogram:
    """What `HistogramStats` is a snapshot of. Not thread-safe."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: of the buckets, ascending."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_all(self, values: Sequence[float]) -> None:
        """As `add` of each; cheaper from some ten on."""
        nums = np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._counts)).tolist()
        self._counts = [count + num for count, num in zip(self._counts, nums, strict=True)]
        self._sum += sum(values)

    def snapshot(self) -> HistogramStats:
        return HistogramStats(self._counts.copy(), self._sum)


class SizeHistogram:
    """Of small whole numbers, which are counted one by one: cheaper still to add to."""

    __slots__ = ("_bounds", "_nums")

    def __init__(self, bounds: Sequence[int]) -> None:
        self._bounds = bounds
        self._nums: list[int] = []  # of each size

    def add(self, size: int) -> None:
        try:
            self._nums[size] += 1
        except IndexError:
            self._nums += [0] * (size + 1 - len(self._nums))
            self._nums[size] += 1

    def snapshot(self) -> HistogramStats:
        ends = [bound + 1 for bound in self._bounds]
        starts = [0, *ends]
        counts = [sum(self._nums[start:end]) for start, end in zip(starts, [*ends, None], strict=True)]
        return HistogramStats(counts, float(sum(size * num for size, num in enumerate(self._nums))))
