"""The contract of every policy in the table, and what each adds to it."""

from __future__ import annotations

import random

import pytest

from cache.expert_key import ExpertKey
from cache.policies import POLICIES

A, B, C = (ExpertKey(0, expert) for expert in range(3))


@pytest.mark.parametrize("name", POLICIES)
def test_a_victim_is_resident_and_evictable_whatever_happened_before(name: str):
    rng = random.Random(0)
    policy, resident = POLICIES[name](8), set()
    for _ in range(2000):
        key = ExpertKey(rng.randrange(3), rng.randrange(8))
        if key in resident:
            policy.touch(key)
            continue
        if len(resident) == 8:
            pinned = set(rng.sample(sorted(resident), 5))
            victim = policy.victim(lambda k, pinned=pinned: k not in pinned)
            assert victim in resident - pinned
            policy.remove(victim)
            resident.remove(victim)
        policy.insert(key)
        resident.add(key)
    assert policy.victim(lambda k: False) is None


@pytest.mark.parametrize("name", POLICIES)
def test_an_empty_policy_has_no_victim(name: str):
    assert POLICIES[name](4).victim(lambda key: True) is None


def test_lru_gives_up_the_least_recently_used():
    policy = POLICIES["lru"](3)
    for key in (A, B, C):
        policy.insert(key)
    policy.touch(A)
    assert policy.victim(lambda key: True) == B
    assert policy.victim(lambda key: key != B) == C
