"""Reuse distances and working sets by hand, and against loops that spell out what they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.reuse import reuse_distances, working_sets
from cache.trace import RoutingTrace
from tests.cache.synthetic_traces import random_trace, trace_of

# one layer, one expert a token: two requests, 0 1 0 0 2 and 0 2
BY_HAND = trace_of(np.asarray([0, 1, 0, 0, 2, 0, 2]).reshape(-1, 1, 1), [5, 2], 3)


def test_distances_are_counted_within_a_request_only():
    distances = reuse_distances(BY_HAND)
    assert distances.num_at.tolist() == [0, 1, 1, 0, 0, 0]  # 0 after two tokens, then after one
    assert distances.num_first == 5
    assert [distances.percentile(p) for p in (0.5, 0.51, 1.0)] == [1, 2, 2]
    assert distances.bins() == [1, 2]
    assert distances.shares([1, 2])[0] == pytest.approx([1 / 7, 1 / 7, 5 / 7])


def test_by_chance_each_token_draws_by_the_popularity_alone():
    p = np.asarray([4, 1, 2]) / 7
    expected = [sum(max(0, n - d) for n in (5, 2)) * (p**2 * (1 - p) ** (d - 1)).sum() for d in range(1, 5)]
    assert reuse_distances(BY_HAND).by_chance[1:5] == pytest.approx(expected)


def test_where_every_token_uses_the_same_experts_all_is_reused_at_once():
    same = reuse_distances(trace_of(np.tile(np.asarray([[[0, 1], [2, 0]]]), (9, 1, 1)), [9], 4))
    assert (same.num_at[1], same.num_first, same.num_uses) == (32, 4, 36)
    assert same.by_chance == pytest.approx(same.num_at)


def test_a_trace_that_uses_nothing_twice_has_no_percentile():
    once = reuse_distances(trace_of(np.asarray([0, 1]).reshape(-1, 1, 1), [2], 3))
    assert (once.percentile(0.5), once.bins(), once.shares([1])[0]) == (None, [1], [0.0, 1.0])


def distances_spelt_out(trace: RoutingTrace) -> tuple[dict[int, int], int]:
    num_at: dict[int, int] = {}
    num_first = 0
    for r in range(trace.num_requests):
        last: dict[tuple[int, int], int] = {}
        for t in range(int(trace.seq_off[r]), int(trace.seq_off[r + 1])):
            for use in {(layer, e) for layer, chosen in enumerate(trace.ids[t].tolist()) for e in chosen}:
                if use in last:
                    num_at[t - last[use]] = num_at.get(t - last[use], 0) + 1
                else:
                    num_first += 1
                last[use] = t
    return num_at, num_first


def sets_spelt_out(trace: RoutingTrace, r: int, length: int | None) -> int:
    rows = trace.ids[trace.seq_off[r] : trace.seq_off[r + 1]][:length].tolist()
    return len({(layer, e) for token in rows for layer, chosen in enumerate(token) for e in chosen})


@given(st.integers(0, 99), st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_distances_and_working_sets_are_what_loops_count(seed: int, lengths: list[int], active: int):
    trace = random_trace(seed, lengths, active=active)
    distances = reuse_distances(trace)
    num_at, num_first = distances_spelt_out(trace)
    assert {d: n for d, n in enumerate(distances.num_at.tolist()) if n} == num_at
    assert (distances.num_first, distances.num_uses) == (num_first, sum(lengths) * 3 * active)
    seen, by_chance = distances.shares(distances.bins())
    assert sum(seen) == pytest.approx(1.0)
    assert sum(by_chance) == pytest.approx(1.0)
    first, whole = working_sets(trace, [1, 4])
    for r, num in enumerate(lengths):
        assert whole[r] == sets_spelt_out(trace, r, None)
        for i, length in enumerate((1, 4)):
            if num >= length:
                assert first[r, i] == sets_spelt_out(trace, r, length)
            else:
                assert np.isnan(first[r, i])


def test_an_expert_named_twice_by_a_token_is_one_use():
    twice = reuse_distances(trace_of(np.asarray([[[0, 0]], [[0, 1]]]), [2], 2))
    assert (twice.num_at[1], twice.num_first) == (1, 2)
