"""cache/histogram.py: what lands in which bucket."""

from __future__ import annotations

import random

import msgspec
import pytest

from cache.histogram import Histogram, HistogramStats, SizeHistogram


def test_a_value_on_a_bound_is_within_it_and_one_beyond_all_is_in_the_last_bucket():
    histogram = Histogram((1.0, 2.5))
    for value in (0.0, 1.0, 1.1, 2.5, 2.6, 1e9):
        histogram.add(value)
    assert histogram.snapshot() == HistogramStats([2, 2, 2], pytest.approx(7.2 + 1e9))
    assert histogram.snapshot().count == 6


def test_a_snapshot_does_not_change_any_more():
    histogram = Histogram((1.0,))
    before = histogram.snapshot()
    histogram.add(0.5)
    assert (before.counts, before.sum) == ([0, 0], 0.0)


def test_sizes_are_counted_as_any_histogram_counts_them():
    bounds, rng = (1, 2, 4, 8, 100), random.Random(0)
    plain, sizes = Histogram(bounds), SizeHistogram(bounds)
    for _ in range(2000):
        size = int(rng.expovariate(0.05))
        plain.add(size)
        sizes.add(size)
    assert sizes.snapshot() == plain.snapshot()


def test_without_a_size_nothing_is_counted():
    assert SizeHistogram((1, 2)).snapshot() == HistogramStats([0, 0, 0], 0.0)


def test_it_is_small_on_the_wire():
    histogram = Histogram(tuple(range(1, 20)))
    for value in range(100):
        histogram.add(value)
    wire = msgspec.msgpack.encode(histogram.snapshot())
    assert len(wire) < 60
    assert msgspec.msgpack.decode(wire, type=HistogramStats) == histogram.snapshot()
