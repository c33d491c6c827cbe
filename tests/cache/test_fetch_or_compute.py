"""Fetch, compute on the CPU, or wait: against every assignment there is, in every order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations
from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from cache.fetch_or_compute import Busy, Missing, choose_cpu, fetch_order, finished_s

times = st.floats(min_value=1e-6, max_value=1e-2)
experts = st.builds(
    Missing,
    device_s=times,
    cpu_s=st.one_of(times, times, st.just(inf)),
    fetch_s=times,
    arrives_s=st.one_of(st.none(), st.none(), times),
)
busies = st.builds(Busy, link_s=st.one_of(st.just(0.0), times), device_s=times, cpu_s=st.one_of(st.just(0.0), times))


def finished_in_order(missing: Sequence[Missing], on_cpu: set[int], order: Sequence[int], busy: Busy) -> float:
    """A call played through, step by step, with the fetches in that order."""
    link, device = busy.link_s, busy.device_s
    waiting = [(e.arrives_s, e.device_s) for i, e in enumerate(missing) if e.arrives_s is not None and i not in on_cpu]
    for i in order:
        link += missing[i].fetch_s
        waiting.append((link, missing[i].device_s))
    for arrives_s, device_s in sorted(waiting):
        device = max(device, arrives_s) + device_s
    cpu = busy.cpu_s + sum(missing[i].cpu_s for i in on_cpu) if on_cpu else 0.0
    return max(device, cpu)


def best_of_all(missing: Sequence[Missing], busy: Busy) -> float:
    best = inf
    for bits in range(2 ** len(missing)):
        on_cpu = {i for i in range(len(missing)) if bits >> i & 1}
        to_fetch = [i for i, e in enumerate(missing) if i not in on_cpu and e.arrives_s is None]
        best = min(best, *(finished_in_order(missing, on_cpu, order, busy) for order in permutations(to_fetch)))
    return best


@settings(max_examples=150, deadline=None)
@given(st.lists(experts, max_size=4), busies)
def test_the_choice_is_within_a_tenth_of_the_best_of_all_assignments(missing: list[Missing], busy: Busy):
    on_cpu = choose_cpu(missing, busy)
    found = finished_in_order(missing, set(on_cpu), fetch_order(missing, on_cpu, busy), busy)
    assert found == finished_s(missing, on_cpu, busy)
    assert found <= 1.1 * best_of_all(missing, busy)


@settings(max_examples=20, deadline=None)
@given(st.integers(min_value=0, max_value=10**6))
def test_so_it_is_for_equal_records_of_nine_experts_with_rows_as_they_come(seed: int):
    rng = random.Random(seed)
    missing = []
    for _ in range(9):  # the costs of one model on one machine: only the rows differ
        rows = rng.choice((1, 1, 1, 2, 4, 16, 64))
        missing.append(Missing(device_s=1e-5 + 1e-7 * rows, cpu_s=3e-4 + 1e-4 * rows, fetch_s=4e-4))
    busy = Busy(link_s=rng.choice((0.0, 1e-3)), device_s=2e-4, cpu_s=2e-5)
    best = min(finished_s(missing, {i for i in range(9) if bits >> i & 1}, busy) for bits in range(2**9))
    assert finished_s(missing, choose_cpu(missing, busy), busy) <= 1.1 * best


def test_with_many_experts_the_cut_shares_the_work_between_link_and_cpu():
    missing = [Missing(device_s=1e-6, cpu_s=1e-3 * (1 + i % 3), fetch_s=1e-3) for i in range(60)]
    on_cpu = choose_cpu(missing, Busy())
    costs = [missing[i].cpu_s for i in on_cpu]
    assert costs.count(1e-3) == 20  # what it has to take longest for is fetched
    assert costs.count(3e-3) == 0
    # 20 and 7 others at two milliseconds, beside 33 copies
    assert 33e-3 < finished_s(missing, on_cpu, Busy()) < 35e-3


def test_a_cpu_that_is_slower_than_the_whole_link_gets_nothing():
    missing = [Missing(device_s=1e-5, cpu_s=1.0, fetch_s=1e-4) for _ in range(8)]
    assert choose_cpu(missing, Busy()) == frozenset()


def test_what_is_about_to_arrive_is_waited_for():
    missing = [Missing(device_s=1e-5, cpu_s=5e-4, arrives_s=1e-5), Missing(device_s=1e-5, cpu_s=5e-4, fetch_s=1e-2)]
    assert choose_cpu(missing, Busy()) == {1}


def test_a_link_that_is_busy_for_long_leaves_the_cpu_more():
    missing = [Missing(device_s=1e-5, cpu_s=2e-3, fetch_s=1e-3) for _ in range(6)]
    nums = [len(choose_cpu(missing, Busy(link_s=busy_s))) for busy_s in (0.0, 4e-3, 20e-3)]
    assert nums == sorted(nums)
    assert 0 < nums[0] < nums[2] == 6
