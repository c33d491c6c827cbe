"""The replay against the cache itself, and on routings whose counts are known."""

from __future__ import annotations

import numpy as np
import pytest

from cache.policies import POLICIES
from cache.replay import replay, schedule
from cache.trace import concatenate, load_all
from tests.cache.synthetic_traces import REAL_TRACES, local_trace, random_trace, trace_of


def test_steps_have_a_token_of_each_running_request_and_ended_ones_are_replaced():
    steps = list(schedule(random_trace(0, [3, 1, 2]), concurrency=2))
    assert [step.rows for step in steps] == [[0, 3], [1, 4], [2, 5]]
    assert [step.requests for step in steps] == [[0, 1], [0, 2], [0, 2]]
    assert [step.ended for step in steps] == [[1], [], [0, 2]]


def test_prompts_come_in_chunks_that_share_a_budget_and_every_token_comes_once():
    trace = random_trace(0, [7, 6, 2], num_prompt=2)
    steps = list(schedule(trace, concurrency=2, prefill_chunk=3))
    assert [(step.rows, step.is_prefill) for step in steps[:2]] == [([0, 1, 7], True), ([2, 8], True)]
    assert sorted(row for step in steps for row in step.rows) == list(range(15))
    assert sorted(request for step in steps for request in step.ended) == [0, 1, 2]


@pytest.mark.parametrize("name", [*POLICIES, "belady"])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_cache_of_everything_misses_each_expert_once(name: str, concurrency: int):
    trace = random_trace(1, [20, 20, 9], num_prompt=4)
    result = replay(trace, name, trace.num_keys, concurrency=concurrency)
    used = {(layer, e) for token in trace.ids.tolist() for layer, chosen in enumerate(token) for e in chosen}
    assert result.num_fetches == len(used)
    assert result.num_queries - result.prefill.hits - result.decode.hits == len(used)
    assert result.num_calls == 3 * result.num_steps
    assert min(result.prefill.queries, result.decode.queries) > 0


@pytest.mark.parametrize("name", [*POLICIES, "belady"])
@pytest.mark.parametrize("num_slots", [1, 3, 5])
def test_a_layer_call_that_does_not_fit_is_done_in_waves(name: str, num_slots: int):
    trace = random_trace(2, [12, 12], num_prompt=10)
    result = replay(trace, name, num_slots, concurrency=2)
    assert result.num_slots == num_slots
    assert result.num_queries - result.num_fetches == result.prefill.hits + result.decode.hits


def test_below_one_tokens_experts_lru_never_hits():
    ids = np.tile(np.asarray([[[0, 1]]]), (50, 4, 1))
    trace = trace_of(ids, [50], 4)
    assert replay(trace, "lru", 6).hit_rate == 0.0
    assert replay(trace, "lru", 8).num_fetches == 8
    assert replay(trace, "belady", 6).hit_rate > 0.6


def test_time_is_of_the_clock_that_was_passed():
    ticks = iter(range(10**6))
    result = replay(random_trace(0, [5]), "lru", 4, clock=lambda: float(next(ticks)))
    assert result.decision_s == result.num_calls


def test_what_cannot_be_replayed_is_refused():
    trace = random_trace(0, [5])
    with pytest.raises(ValueError, match="unknown cache policy 'best'; known: belady, least_stale"):
        replay(trace, "best", 4)
    with pytest.raises(ValueError, match="at least one slot"):
        replay(trace, "lru", 0)
    with pytest.raises(ValueError, match="at least 1"):
        replay(trace, "lru", 4, concurrency=0)


def test_prompts_do_not_cost_a_decoding_request_more_than_under_lru():
    trace = concatenate([local_trace(3, [120]), local_trace(4, [40] * 6, num_prompt=36)])
    num_slots = trace.num_keys // 2
    rates = {}
    for name in ("lru", "segment"):
        decode = replay(trace, name, num_slots, concurrency=2).decode
        rates[name] = decode.hits / decode.queries
    assert rates["segment"] >= rates["lru"]


@pytest.mark.skipif(not REAL_TRACES.is_dir(), reason="the real traces are not here")
@pytest.mark.parametrize(("folder", "share"), [("gpt-oss-20b", 0.3), ("qwen1.5-moe-a2.7b", 0.2)])
def test_segment_goes_part_of_the_way_from_lru_to_belady_on_real_requests(folder: str, share: float):
    trace = load_all(REAL_TRACES / folder)[-1]
    trace = trace.select(trace.num_requests - 1, trace.num_requests)
    num_slots = trace.num_keys // 4
    lru, segment, belady = (replay(trace, name, num_slots).hit_rate for name in ("lru", "segment", "belady"))
    assert segment - lru >= share * (belady - lru)
