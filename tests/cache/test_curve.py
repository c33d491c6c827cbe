"""Samples of whole requests, and what is said of curves whose shape is known."""

from __future__ import annotations

import numpy as np
import pytest

from cache.curve import Point, hit_curve, sample_of, verdict
from cache.replay import ReplayResult, replay
from cache.stats import PhaseStats
from tests.cache.synthetic_traces import local_trace, random_trace


def test_a_sample_is_of_whole_requests_spread_over_the_trace():
    trace = random_trace(0, [10] * 20)
    sample, whole = sample_of(trace, 45)
    assert whole
    assert np.diff(sample.seq_off).tolist() == [10] * 4
    starts = [20, 70, 120, 170]  # requests 2, 7, 12, 17
    assert (sample.ids == np.concatenate([trace.ids[start : start + 10] for start in starts])).all()


def test_a_trace_that_fits_is_taken_as_it_is_and_empty_requests_are_passed_over():
    trace = random_trace(0, [5, 0, 5])
    assert sample_of(trace, 10) == (trace, True)
    assert np.diff(sample_of(trace, 9)[0].seq_off).tolist() == [5]


def test_of_requests_that_are_too_long_the_beginnings_are_taken():
    trace = random_trace(0, [30, 40, 50], num_prompt=20)
    sample, whole = sample_of(trace, 12)
    assert (sample.num_tokens, sample.num_prompt.tolist(), whole) == (12, [12], False)
    assert (sample.ids == trace.ids[30:42]).all()
    sample, whole = sample_of(trace, 12, concurrency=4)
    assert (np.diff(sample.seq_off).tolist(), whole) == ([4, 4, 4], False)


def test_a_curve_has_the_sizes_asked_for_and_room_for_all_experts():
    trace = local_trace(0, [20, 20])
    points = hit_curve(trace, [24, 12, 24])
    assert [point.num_slots for point in points] == [12, 24, trace.num_keys]
    for point in points:
        for name, result in point.results.items():
            assert result.hit_rate == replay(trace, name, point.num_slots).hit_rate
        assert point.results["belady"].hit_rate >= max(point.hit_rate, point.results["lru"].hit_rate)


def curve_of(rates: dict[int, float], lru: dict[int, float] | None = None) -> list[Point]:
    def result(policy: str, num_slots: int, rate: float) -> ReplayResult:
        decode = PhaseStats(queries=1000, hits=round(1000 * rate))
        return ReplayResult(policy, num_slots, PhaseStats(), decode, 0, 1, 1, 0.0)

    return [
        Point(
            num_slots,
            {name: result(name, num_slots, (lru or rates)[num_slots] if name == "lru" else rate) for name in POLICIES},
        )
        for num_slots, rate in rates.items()
    ]


POLICIES = ("lru", "segment", "belady")


def test_a_curve_that_is_flat_from_somewhere_on_is_enough_there():
    found = verdict(curve_of({10: 0.3, 20: 0.74, 40: 0.9, 60: 0.97, 80: 0.972, 100: 0.972}))
    assert (found.best.num_slots, found.enough.num_slots, found.nothing_more) == (20, 60, True)
    assert found.helps
    assert found.working is None


def test_a_curve_that_still_rises_a_little_is_enough_though_not_over():
    found = verdict(curve_of({10: 0.5, 25: 0.9, 50: 0.915, 100: 0.93}))
    assert (found.enough.num_slots, found.nothing_more) == (25, False)


def test_where_all_fits_the_first_size_is_enough():
    found = verdict(curve_of({5: 0.98, 50: 0.98, 100: 0.98}))
    assert (found.best.num_slots, found.enough.num_slots, found.nothing_more) == (5, 5, True)


def test_a_curve_that_rises_to_the_end_is_enough_only_with_all_experts():
    found = verdict(curve_of({25: 0.5, 50: 0.7, 75: 0.85, 100: 0.99}))
    assert (found.enough.num_slots, found.helps) == (100, True)


def test_hits_in_proportion_to_the_size_are_no_help():
    assert not verdict(curve_of({25: 0.26, 50: 0.51, 75: 0.74, 100: 0.98})).helps


@pytest.mark.parametrize(("at_small", "working"), [(0.0, 40), (0.1, None)])
def test_the_size_is_named_from_which_lru_hits(at_small: float, working: int | None):
    rates = {20: 0.3, 40: 0.6, 100: 0.9}
    found = verdict(curve_of(rates, {20: at_small, 40: 0.5, 100: 0.9}))
    assert (found.working and found.working.num_slots) == working
