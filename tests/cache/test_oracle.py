"""cache/oracle.py: what a future-knowing cache would have hit on the windows that are looked at."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from cache.expert_key import ExpertKey
from cache.oracle import OracleSampler
from cache.policies.belady import BeladyPolicy
from cache.policies.lru import LruPolicy
from cache.replay import Books

Call = Sequence[ExpertKey]


class Ticks:
    """Each look at the clock takes a microsecond."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


def run(steps: Sequence[Sequence[Call]], num_slots: int, step_s: float = 1.0) -> OracleSampler:
    """An LRU cache asked for each step's layer calls, and the sampler that watches it."""
    policy = LruPolicy(num_slots, (), 0)
    books = Books(policy, num_slots)
    sampler = OracleSampler(num_slots, books.resident, Ticks())
    sampler.step_ended(step_s)  # it is told of steps from here on
    for calls in steps:
        for keys in calls:
            held = [key for key in keys if key in books.resident]
            sampler.saw(keys, len(held))
            books.ask(keys)
        sampler.step_ended(step_s)
    return sampler


def keys(*experts: int, layer: int = 0) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def test_going_round_one_expert_more_than_slots_an_oracle_mostly_hits_and_lru_never():
    """Three slots, four experts in turn: Belady misses every third call, LRU all; three miss as the cache is empty."""
    steps = [[keys(i % 4)] for i in range(128 + 40)]
    stats = run(steps, 3).stats
    assert (stats.queries, stats.hits) == (64, 0)
    assert stats.oracle_hits == pytest.approx((64 - 3) * 2 / 3, abs=1)


@pytest.mark.parametrize("num_slots", [5, 12, 30])
def test_it_counts_what_a_replay_with_beladys_policy_counts(num_slots: int):
    rng = random.Random(num_slots)
    calls = [keys(*rng.sample(range(16), rng.randint(1, 5)), layer=i % 3) for i in range(256)]
    uses: dict[ExpertKey, list[int]] = {}
    for i, call in enumerate(calls):
        for key in call:
            uses.setdefault(key, []).append(i)
    policy = BeladyPolicy(num_slots, (), 0)
    policy.foresee(uses)
    books, hits = Books(policy, num_slots), 0
    for call in calls[:128]:
        policy.observe(0, (), (), False)
        hits += books.ask(call)
    steps = [calls[i : i + 2] for i in range(0, 256, 2)]
    stats = run(steps + [[] for _ in range(300)], num_slots).stats
    assert (stats.queries, stats.oracle_hits) == (sum(map(len, calls[:128])), pytest.approx(hits, rel=0.01))


def test_layer_calls_that_do_not_fit_are_computed_in_waves():
    """Of each five experts three can be there, if they are those that the call before has in common with it."""
    steps = [[keys(*range(i % 2, i % 2 + 5))] for i in range(128)]
    stats = run(steps + [[] for _ in range(300)], 3).stats
    assert (stats.queries, stats.oracle_hits) == (64 * 5, 63 * 3)


def test_what_was_there_when_the_window_began_is_there_for_the_oracle_too():
    resident = dict.fromkeys(keys(0, 1, 2))
    sampler = OracleSampler(3, resident, Ticks())
    sampler.step_ended(1.0)
    for _ in range(128 + 40):
        sampler.saw(keys(0, 1, 2), 3)
        sampler.step_ended(1.0)
    assert (sampler.stats.queries, sampler.stats.hits, sampler.stats.oracle_hits) == (192, 192, 192)


@pytest.mark.parametrize("num_slots", [8, 16, 40])
def test_it_is_at_least_about_as_good_as_what_it_watches(num_slots: int):
    rng = random.Random(num_slots)

    def step() -> list[Call]:
        return [keys(*sorted({int(rng.paretovariate(0.7)) % 16 for _ in range(4)}), layer=i) for i in range(4)]

    sampler = run([step() for _ in range(1500)], num_slots)
    assert sampler.stats.queries > 5000
    assert 1.05 * sampler.stats.hits < sampler.stats.oracle_hits <= sampler.stats.queries


def test_no_more_than_its_share_of_the_steps_time_goes_into_it():
    """Steps of 1 ms pay for 3 looks each: a window of 128 calls takes about 128 + 64 + 2 of them."""
    steps = [[keys(i % 4)] for i in range(128 + 40)]
    assert run(steps, 3, step_s=1e-3).stats.queries == 0
    steps += [[keys(i % 4)] for i in range(128)]
    assert run(steps, 3, step_s=1e-3).stats.queries == 64


def test_nothing_is_kept_of_calls_that_belong_to_no_step():
    sampler = OracleSampler(3, {}, Ticks())
    for _ in range(1000):
        sampler.saw(keys(1), 0)
    assert not sampler._calls


def test_a_step_without_experts_is_no_step_of_a_window():
    sampler = OracleSampler(3, {}, Ticks())
    for _ in range(1000):
        sampler.step_ended(1.0)
    assert sampler.stats.queries == 0
