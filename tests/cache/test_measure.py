"""All measures of a trace at once, on routing whose answers are known, and on recorded routing."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from cache.analysis import (
    popularity,
    segment_cache_best_hit_rate,
    segment_routing_best_performance,
    specialisation,
)
from cache.measure import measure
from cache.trace import RoutingTrace, concatenate, load_all
from tests.cache.synthetic_traces import REAL_TRACES, local_trace, random_trace, trace_of


def sequences(trace: RoutingTrace) -> list[np.ndarray]:
    """Spelt out, [T, L, E] of each request."""
    found = []
    for r in range(trace.num_requests):
        rows = trace.ids[trace.seq_off[r] : trace.seq_off[r + 1]]
        found.append(np.asarray([[[e in chosen for e in range(trace.num_experts)] for chosen in t] for t in rows]))
    return found


def test_a_layer_whose_experts_are_used_alike_and_one_that_always_uses_the_same():
    ids = np.asarray([[[t % 4], [3]] for t in range(16)])
    found = measure(trace_of(ids, [8, 8], 4), window=4, sizes=[2, 4])
    alike, same = found.layers
    assert (alike.layer, same.layer) == (1, 2)
    assert alike.popularity == [0.25] * 4
    assert (alike.top_quarter, alike.unused) == (0.25, 0)
    assert alike.effective == pytest.approx(4.0)
    assert (same.top_expert, same.top_quarter, same.unused) == (3, 1.0, 3)
    assert same.effective == pytest.approx(1.0)
    assert (found.num_keys, found.active_keys) == (8, 2)
    assert [(batch.num_tokens, batch.in_a_row) for batch in found.batches[:4]] == [(1, 1), (2, 1.5), (4, 2.5), (8, 2.5)]
    assert [batch.of_requests is None for batch in found.batches] == [False, False, *[True] * 5]
    assert found.set_lengths == [1, 4]
    assert found.working_sets[0].first == [2.0, 5.0]
    assert [size.num_slots for size in found.curve] == [2, 4, 8]
    assert found.curve[-1].hit_rate["lru"] == pytest.approx(1 - 5 / 32)


def test_its_locality_is_that_of_the_requests():
    trace = replace(local_trace(1, [30, 20, 7]), domains=("a", "b", "a"))
    found = measure(trace, window=8, ratios=[1.0, 2.0], sizes=[24])
    chosen = sequences(trace)
    assert found.srp == pytest.approx(segment_routing_best_performance(chosen, 8))
    for sch in found.sch:
        assert sch.hit_rate == pytest.approx(segment_cache_best_hit_rate(chosen, 8, sch.ratio))
    by_domain = {"a": [chosen[0], chosen[2]], "b": [chosen[1]]}
    assert found.specialisation == pytest.approx(specialisation(by_domain))
    assert [layer.popularity for layer in found.layers] == popularity(chosen).tolist()
    assert [(row.domain, row.num_requests) for row in found.working_sets] == [(None, 3), ("a", 2), ("b", 1)]
    assert found.overlap.weighted[1][1] is None
    assert found.overlap.within["weighted"] == found.overlap.weighted[0][0]
    assert found.overlap.between["weighted"] == pytest.approx(found.overlap.weighted[0][1])


def test_the_same_seed_gives_the_same_numbers_and_they_survive_json():
    trace = local_trace(2, [18] * 6)
    first, again = (measure(trace, sizes=[24], seed=3) for _ in range(2))
    assert first == again
    assert msgspec.json.decode(msgspec.json.encode(first), type=type(first)) == first


def test_an_empty_request_changes_nothing():
    without = local_trace(2, [18, 20])
    parts = [without.select(0, 1), without.select(0, 0), without.select(1, 2)]
    empty = replace(parts[1], seq_off=np.zeros(2, dtype=np.int64), num_prompt=np.zeros(1, int), domains=("synthetic",))
    with_it = concatenate([parts[0], empty, parts[2]])
    found, expected = measure(with_it, sizes=[24]), measure(without, sizes=[24])
    assert msgspec.structs.replace(found, num_requests=2, replayed_requests=2) == expected


def test_what_is_replayed_is_said():
    trace = local_trace(3, [20] * 6)
    found = measure(trace, sizes=[24], replay_tokens=50)
    assert (found.replayed_requests, found.replayed_tokens, found.replayed_whole) == (2, 40, True)
    found = measure(trace, sizes=[24], replay_tokens=7, concurrency=2)
    assert (found.replayed_requests, found.replayed_tokens, found.replayed_whole) == (2, 6, False)


def test_windows_longer_than_any_request_are_refused():
    with pytest.raises(ValueError, match="no sequence has 16 tokens"):
        measure(random_trace(0, [15, 3]), sizes=[4])


@pytest.mark.skipif(not REAL_TRACES.is_dir(), reason="the real traces are not here")
@pytest.mark.parametrize("folder", ["granite-3.0-1b-a400m", "qwen1.5-moe-a2.7b"])
def test_recorded_routing_is_more_local_than_chance_and_less_than_perfect(folder: str):
    trace = concatenate(load_all(REAL_TRACES / folder))
    found = measure(trace, sizes=[trace.num_keys // 4], replay_tokens=60)
    assert 0.2 < found.srp < 1.0
    assert 0 < found.sch[0].hit_rate < found.sch[1].hit_rate < found.sch[2].hit_rate < 1.0
    assert found.reuse.shares[0] > found.reuse.shares_by_chance[0]
    assert math.isclose(sum(found.reuse.shares) + found.reuse.first, 1.0)
    for batch in found.batches[1:]:
        assert batch.in_a_row is not None
        assert batch.in_a_row < batch.uniform
