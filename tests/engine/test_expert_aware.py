from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.errors import ConfigError
from engine.expert_aware import ExpertAwareScheduler, num_due, overlapping
from engine.request import Request
from engine.scheduler import FcfsScheduler
from tests.engine.test_scheduler import fresh_request, step

NUM_KEYS = 32


class Experts:
    """Requests use the experts that their id names: "3a" those of group 3."""

    def __init__(self, is_short: bool = True) -> None:
        self.is_short = is_short
        self.here: set[int] = set()
        self.favourite: int | None = None  # the adversary's: whose requests fit best, whatever was asked before

    def uses(self, requests: Sequence[Request]) -> NDArray[np.float32]:
        uses = np.zeros((len(requests), NUM_KEYS), dtype=np.float32)
        for row, request in zip(uses, requests, strict=True):
            group = int(request.request_id[0])
            row[4 * group : 4 * group + 4] = 0.01 if group == self.favourite else 0.9
        return uses

    def resident(self) -> NDArray[np.bool_]:
        return np.asarray([key in self.here for key in range(NUM_KEYS)])


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(experts: Experts | None, clock: Clock | None = None, num_blocks: int = 1000, **kwargs: Any) -> Any:
    config = SchedulerConfig(**{"max_num_seqs": 16, "max_num_batched_tokens": 64, **kwargs})
    config.check()
    return ExpertAwareScheduler(config, BlockManager(num_blocks, 4), experts, clock or Clock())


def decoding(scheduler: ExpertAwareScheduler, names: Sequence[str]) -> None:
    """Bring requests to where they decode."""
    for name in names:
        scheduler.add(fresh_request(2, name))
    while scheduler.waiting or any(request.num_output_tokens == 0 for request in scheduler.running):
        step(scheduler)


def test_a_group_shares_its_experts():
    scheduler = make(Experts(), max_step_seqs=4, quantum=1)
    decoding(scheduler, ["0a", "1a", "2a", "0b", "1b", "2b", "0c", "1c", "2c", "0d", "1d", "2d"])
    for _ in range(3):
        step(scheduler)
    scheduled = [{name[0] for name in step(scheduler)} for _ in range(12)]
    assert sum(len(groups) for groups in scheduled) <= 12 * 1.5  # of three kinds; by chance nearly all in each


def test_a_group_prefers_what_is_in_memory():
    experts = Experts()
    experts.here = set(range(8, 12))
    scheduler = make(experts, max_step_seqs=2)
    for name in ("0a", "1a", "2a"):
        scheduler.add(fresh_request(1, name))
        scheduler.running.append(scheduler.waiting.popleft())
    assert scheduler._filled([], 1)[0].request_id == "2a"


def test_a_group_stays_for_its_quantum_and_a_place_that_falls_free_is_taken():
    scheduler = make(Experts(), max_step_seqs=4, quantum=6)
    decoding(scheduler, ["0a", "0b", "0c", "0d", "1a", "1b", "1c", "1d"])
    while scheduler._num_left:
        step(scheduler)
    first = set(step(scheduler))
    assert all(set(step(scheduler)) == first for _ in range(3))
    gone = next(request for request in scheduler.running if request.request_id in first)
    scheduler.remove(gone)
    after = set(step(scheduler))
    assert len(after) == 4
    assert after > first - {gone.request_id}


def test_a_prompt_that_waits_begins_beside_a_full_group():
    scheduler = make(Experts(), max_step_seqs=4, max_num_seqs=8, quantum=4)
    decoding(scheduler, ["0a", "0b", "0c", "0d", "0e"])
    scheduler.add(fresh_request(3, "1a"))
    assert "1a" in step(scheduler)
    assert "1a" in step(scheduler)  # and goes on with the group


@pytest.mark.parametrize("limit", [2, 3, 6])
@pytest.mark.parametrize("quantum", [1, 4])
def test_nobody_is_passed_over_more_often_than_allowed_whatever_fits_better(limit: int, quantum: int):
    """The adversary gives a request of the favourite kind, which costs nothing, as soon as one has ended."""
    experts = Experts()
    experts.favourite = 0
    scheduler = make(
        experts, max_step_seqs=9, max_num_seqs=24, max_passed_over=limit, quantum=quantum, max_num_batched_tokens=100
    )
    decoding(scheduler, [f"{i % 2}{i}" for i in range(24)])
    last = dict.fromkeys(scheduler.running, 0)
    for now in range(1, 400):
        scheduled = step(scheduler)
        for request in list(scheduler.running):
            if request.request_id in scheduled:
                last[request] = now
            assert now - last.setdefault(request, now) <= (limit + 1) * quantum + 1
        for request in [r for r in scheduler.running if r.request_id in scheduled and r.request_id[0] == "0"]:
            scheduler.remove(request)
            scheduler.add(fresh_request(1, f"0new{now}"))
    scheduler.check_integrity()


@given(
    st.integers(1, 5), st.integers(1, 6), st.lists(st.integers(0, 2**30), min_size=40, max_size=40), st.integers(1, 36)
)
@settings(deadline=None, max_examples=200)
def test_the_bound_holds_whoever_else_is_chosen(size: int, limit: int, choices: list[int], num: int):
    num = min(num, (limit + 1) * size)
    passed = [0] * num
    for choice in choices:
        order = sorted(range(num), key=lambda i: -passed[i])
        must = order[: num_due([passed[i] for i in order], limit, size)]
        assert len(must) <= size
        others = random.Random(choice).sample(order[len(must) :], k=min(size - len(must), num - len(must)))
        passed = [0 if i in must or i in others else p + 1 for i, p in enumerate(passed)]
        assert max(passed) <= limit


def test_no_waiting_request_is_passed_by_more_often_than_allowed():
    experts = Experts()
    experts.favourite = 0
    scheduler = make(experts, max_num_seqs=2, max_passed_over=5, max_num_batched_tokens=16)
    decoding(scheduler, ["1a", "1b"])
    scheduler.add(fresh_request(2, "1unlucky"))
    begun: list[str] = []
    for i in range(20):
        scheduler.add(fresh_request(2, f"0{i}"))
        scheduler.remove(scheduler.running[0])
        before = set(scheduler.running)
        step(scheduler)
        begun += [request.request_id for request in scheduler.running if request not in before]
    assert begun.index("1unlucky") == 5
    assert begun[:5] == [f"0{i}" for i in range(5)]


def test_a_request_past_its_deadline_goes_first():
    experts, clock = Experts(), Clock()
    scheduler = make(experts, clock, max_step_seqs=3, quantum=1, target_itl_s=1.0, max_passed_over=16)
    decoding(scheduler, ["0a", "0b", "0c", "0d", "1a"])
    experts.favourite = 0
    missed = 0
    for _ in range(30):
        clock.now += 0.3
        output = scheduler.schedule()
        scheduler.update(output)
        scheduler.took(output, 0.3)
        for request in output.num_tokens:
            request.token_ids.append(7)
        missed = 0 if any(r.request_id == "1a" for r in output.num_tokens) else missed + 1
        assert missed <= 4


@pytest.mark.parametrize("experts", [None, Experts(is_short=False)])
@pytest.mark.parametrize("seed", range(4))
def test_where_nothing_is_short_it_is_first_come_first_served(experts: Experts | None, seed: int):
    config = SchedulerConfig(max_num_seqs=6, max_step_seqs=4, max_num_batched_tokens=16)
    ours = ExpertAwareScheduler(config, BlockManager(16, 4), experts, Clock())
    theirs = FcfsScheduler(config, BlockManager(16, 4))
    schedules = []
    for scheduler in (ours, theirs):
        random.seed(seed)
        steps = []
        for i in range(150):
            if random.random() < 0.3:
                scheduler.add(fresh_request(random.randint(1, 30), f"{i % 8}-{i}"))
            steps.append(step(scheduler))
            for request in [r for r in scheduler.running if r.num_output_tokens > 5]:
                scheduler.remove(request)
        schedules.append(steps)
    assert schedules[0] == schedules[1]


@pytest.mark.parametrize("seed", range(6))
def test_every_request_ends_and_no_step_is_larger_than_it_may_be(seed: int):
    random.seed(seed)
    scheduler = make(Experts(), num_blocks=20, max_num_seqs=8, max_step_seqs=3, max_num_batched_tokens=8, quantum=2)
    pending = [fresh_request(random.randint(1, 30), f"{i % 8}-{i}") for i in range(30)]
    for _ in range(4000):
        if pending and random.random() < 0.3:
            scheduler.add(pending.pop())
        output = step(scheduler)
        assert len(output) <= 3
        assert sum(output.values()) <= 8
        for request in [r for r in scheduler.running if r.num_output_tokens >= 4]:
            scheduler.remove(request)
        if not pending and not scheduler.has_work:
            break
    assert not scheduler.has_work
    assert not pending


def teach(scheduler: ExpertAwareScheduler, *, base: float, row: float, stream: float, token: float) -> None:
    for i in range(60):
        rows, tokens = i % 7, (0, 40, 200)[i % 3]
        seconds = base + row * rows + (stream + token * tokens if tokens else 0.0)
        scheduler._costs.add(rows, tokens, seconds)


def test_a_prompt_is_computed_in_larger_chunks_where_streaming_its_experts_costs_more():
    chunks = []
    for stream in (0.01, 1.0, 100.0):
        scheduler = make(Experts(), max_num_batched_tokens=128, max_streamed_tokens=1024, num_blocks=4000)
        teach(scheduler, base=0.01, row=0.001, stream=stream, token=0.002)
        scheduler.add(fresh_request(3000, "0a"))
        chunks.append(step(scheduler)["0a"])
    assert chunks[0] == 128
    assert 450 < chunks[1] < 550  # as much computing as streaming
    assert chunks[2] == 1024


def test_a_chunk_leaves_those_who_decode_their_target():
    scheduler = make(Experts(), max_num_batched_tokens=128, max_streamed_tokens=1024, target_itl_s=0.3, num_blocks=4000)
    decoding(scheduler, ["0a", "0b"])
    teach(scheduler, base=0.01, row=0.001, stream=0.1, token=0.002)
    scheduler.add(fresh_request(3000, "0c"))
    scheduled = step(scheduler)
    assert scheduled["0a"] == scheduled["0b"] == 1
    assert 80 < scheduled["0c"] < 96  # (0.3 - 0.112) / 0.002


def test_no_more_requests_run_than_the_target_allows_but_late_ones_begin():
    clock = Clock()
    scheduler = make(Experts(), clock, target_itl_s=0.1, target_ttft_s=5.0)
    teach(scheduler, base=0.05, row=0.01, stream=0.0, token=0.0)
    decoding(scheduler, ["0a"])
    teach(scheduler, base=0.05, row=0.01, stream=0.0, token=0.0)
    for i in range(9):
        scheduler.add(fresh_request(1, f"0{i}"))
    step(scheduler)
    assert len(scheduler.running) == 5
    clock.now += 6.0
    step(scheduler)
    assert len(scheduler.running) == 10


def test_the_greedy_choice_adds_the_fewest_misses():
    rng = np.random.default_rng(3)
    uses = rng.random((12, NUM_KEYS), dtype=np.float32)
    absent = rng.random(NUM_KEYS, dtype=np.float32)
    chosen = overlapping(uses, absent, [4], 5)
    assert chosen[0] == 4
    assert len(set(chosen)) == 5

    def misses(group: list[int]) -> float:
        return float((absent * (1.0 - np.prod(1.0 - uses[group], axis=0))).sum())

    for earlier, later in pairwise([chosen[:n] for n in range(1, 6)]):
        best = min(misses([*earlier, i]) for i in range(12) if i not in earlier)
        assert misses(later) == pytest.approx(best, rel=1e-5)
    assert overlapping(uses, absent, [], 40) is not None
    assert sorted(overlapping(uses, absent, [], 40)) == list(range(12))


def test_a_bound_that_cannot_be_kept_is_refused():
    with pytest.raises(ConfigError, match="within 2 turns"):
        make(Experts(), max_num_seqs=64, max_step_seqs=8, max_passed_over=2)
    with pytest.raises(ConfigError, match="target_itl must be"):
        make(Experts(), target_itl_s=0.0)
