"""engine/step_parts.py: where a real engine's steps spend their time, and what they consist of."""

from __future__ import annotations

import time

import pytest

from engine.messages import BATCH_TOKENS, STEP_S
from tests.engine.conftest import greedy, run_all


def test_the_parts_of_steps_are_the_steps(checkpoint, make_engine):
    engine = make_engine(checkpoint("olmoe")[0], cache={"memory_nbytes": 200_000, "link_bandwidth": 2e7})
    began = time.perf_counter()
    run_all(engine, {f"r{i}": ([1 + i, 2, 3, 4, 5], greedy(12)) for i in range(3)})
    seconds = time.perf_counter() - began
    stats = engine.stats()
    parts = {part: histogram.sum for part, histogram in stats.step_s.items()}
    assert set(parts) == {"attention", "moe", "stall", "sample", "schedule"}
    assert all(value > 0 for value in parts.values())
    assert parts["stall"] == pytest.approx(engine.expert_cache.stall_s)
    assert stats.step_seconds_total * 0.95 < sum(parts.values()) < seconds
    for histogram in stats.step_s.values():
        assert histogram.count == stats.steps_total
        assert len(histogram.counts) == len(STEP_S) + 1


def test_a_steps_tokens_are_counted(checkpoint, make_engine):
    engine = make_engine(checkpoint("llama-llama3-rope")[0])
    run_all(engine, {f"r{i}": ([1, 2, 3, 4, 5], greedy(4)) for i in range(3)})
    tokens = engine.stats().batch_tokens
    counted = dict(zip([*BATCH_TOKENS, None], tokens.counts, strict=True))
    assert {bound: num for bound, num in counted.items() if num} == {16: 1, 4: 3}
    assert tokens.sum == 15 + 3 * 3
    assert engine.stats().step_s["stall"].sum == 0.0
