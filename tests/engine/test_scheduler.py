from __future__ import annotations

import random
import time

import pytest

from engine.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.request import Request
from engine.scheduler import FcfsScheduler
from engine.schedulers import SCHEDULERS
from tests.engine.test_block_manager import make_request

BLOCK_SIZE = 4


def make_scheduler(name: str = "fcfs", num_blocks: int = 64, **kwargs: int) -> FcfsScheduler:
    config = SchedulerConfig(policy=name, **{"max_num_seqs": 4, "max_num_batched_tokens": 16, **kwargs})
    return SCHEDULERS[name](config, BlockManager(num_blocks, BLOCK_SIZE), None, time.perf_counter)


def fresh_request(num_tokens: int, name: str = "r") -> Request:
    return make_request([random.randrange(10**6) for _ in range(num_tokens)], name)


def step(scheduler: FcfsScheduler) -> dict[str, int]:
    """Schedule, compute, and give each request that caught up its next token."""
    output = scheduler.schedule()
    scheduler.update(output)
    for request in output.num_tokens:
        if request.num_new_tokens == 0:
            request.token_ids.append(random.randrange(10**6))
    scheduler.check_integrity()
    return {request.request_id: num for request, num in output.num_tokens.items()}


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    scheduler = make_scheduler()
    scheduler.add(fresh_request(37, "a"))
    assert [step(scheduler) for _ in range(4)] == [{"a": 16}, {"a": 16}, {"a": 5}, {"a": 1}]


def test_decoding_requests_get_their_token_beside_a_chunk():
    scheduler = make_scheduler()
    scheduler.add(fresh_request(5, "a"))
    assert step(scheduler) == {"a": 5}
    scheduler.add(fresh_request(40, "b"))
    assert step(scheduler) == {"a": 1, "b": 15}
    assert step(scheduler) == {"a": 1, "b": 15}


def test_an_older_requests_backlog_does_not_starve_those_behind_it():
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.add(fresh_request(4, name))
    step(scheduler)
    scheduler.running[0].token_ids += [1] * 100
    assert step(scheduler) == {"a": 15, "b": 1}


def test_no_more_sequences_run_than_allowed():
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(fresh_request(3, name))
    assert step(scheduler) == {"a": 3, "b": 3}
    scheduler.remove(scheduler.running[0])
    assert step(scheduler) == {"b": 1, "c": 3}


def test_requests_start_in_their_order_even_if_a_later_one_would_fit():
    scheduler = make_scheduler(num_blocks=6)
    scheduler.add(fresh_request(16, "a"))
    step(scheduler)
    scheduler.add(fresh_request(16, "long"))
    scheduler.add(fresh_request(2, "short"))
    assert step(scheduler) == {"a": 1}


def test_when_memory_is_full_the_newest_is_preempted_and_goes_on_later():
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(fresh_request(7, "old"))
    scheduler.add(fresh_request(7, "new"))
    assert step(scheduler) == {"old": 7, "new": 7}
    assert step(scheduler) == {"old": 1, "new": 1}
    assert step(scheduler) == {"old": 1}
    assert scheduler.num_preemptions == 1
    new = scheduler.waiting[0]
    assert (new.num_computed_tokens, new.num_tokens, new.block_ids) == (0, 9, [])
    scheduler.remove(scheduler.running[0])
    computed = step(scheduler)["new"]
    assert new.num_computed_tokens == 9
    assert computed < 9  # what of its blocks was not overwritten is found again


def test_a_removed_request_frees_its_blocks_in_every_state():
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=1)
    running, waiting = fresh_request(30, "a"), fresh_request(3, "b")
    scheduler.add(running)
    scheduler.add(waiting)
    step(scheduler)
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.schedule().num_tokens == {}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("seed", range(8))
def test_every_request_ends_and_the_budget_holds_under_any_load(name: str, seed: int):
    random.seed(seed)
    scheduler = make_scheduler(name, num_blocks=12, max_num_seqs=4, max_num_batched_tokens=8)
    wanted = {f"r{i}": random.randint(1, 10) for i in range(25)}
    pending = [fresh_request(random.randint(1, 30), request_id) for request_id in wanted]
    for _ in range(3000):
        if pending and random.random() < 0.3:
            scheduler.add(pending.pop())
        scheduled = step(scheduler)
        assert sum(scheduled.values()) <= 8
        assert len(scheduled) <= 4
        assert all(num > 0 for num in scheduled.values())
        for request in [r for r in scheduler.running if r.num_output_tokens >= wanted[r.request_id]]:
            scheduler.remove(request)
        if not pending and not scheduler.has_work:
            break
    assert not pending
    assert not scheduler.has_work
