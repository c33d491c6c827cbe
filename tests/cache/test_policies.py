"""The contract of every policy in the table, and what each adds to it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.expert_key import ExpertKey
from cache.policies import POLICIES
from cache.policies.belady import BeladyPolicy
from cache.replay import REPLAY_POLICIES, replay
from tests.cache.synthetic_traces import local_trace, random_trace

LAYERS, NUM_EXPERTS = (1, 2, 5), 8  # neither from 0 nor contiguous
A, B, C, D = (ExpertKey(1, expert) for expert in range(4))
names = pytest.mark.parametrize("name", sorted(REPLAY_POLICIES))


def make(name: str, num_slots: int = 8):
    return REPLAY_POLICIES[name](num_slots, LAYERS, NUM_EXPERTS)


def always(key: ExpertKey) -> bool:
    return True


@names
def test_a_victim_is_resident_and_evictable_whatever_happened_before(name: str):
    rng = random.Random(0)
    policy, resident = make(name), set()
    for _ in range(2000):
        key = ExpertKey(rng.choice(LAYERS), rng.randrange(NUM_EXPERTS))
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


EXPERT = st.integers(0, NUM_EXPERTS - 1)
STEP = st.lists(st.tuples(st.integers(0, 4), st.lists(EXPERT, min_size=2, max_size=2, unique=True)), min_size=1)
OPERATION = st.one_of(
    st.tuples(st.just("call"), st.sampled_from(LAYERS), STEP, st.booleans()),
    st.tuples(st.just("end"), st.integers(0, 6)),
    st.tuples(st.just("drop"), st.integers(0, 100)),
)


@pytest.mark.parametrize("num_slots", [1, 3, 8])
@names
@settings(max_examples=40, deadline=None)
@given(operations=st.lists(OPERATION, max_size=30))
def test_the_protocol_is_kept_in_any_order_of_calls(name: str, num_slots: int, operations: list):
    policy, resident = make(name, num_slots), set()
    for operation in operations:
        if operation[0] == "end":
            policy.ended(operation[1])
        elif operation[0] == "drop" and resident:  # a read that failed
            dropped = sorted(resident)[operation[1] % len(resident)]
            policy.remove(dropped)
            resident.remove(dropped)
        elif operation[0] == "call":
            _, layer, step, is_prefill = operation
            policy.observe(layer, [request for request, _ in step], [chosen for _, chosen in step], is_prefill)
            pinned = set()
            for key in sorted({ExpertKey(layer, expert) for _, chosen in step for expert in chosen}):
                if key in resident:
                    policy.touch(key)
                else:
                    if len(resident) == num_slots:
                        if pinned >= resident:
                            pinned.clear()  # the next wave
                        victim = policy.victim(lambda k, pinned=pinned: k not in pinned)
                        assert victim in resident - pinned
                        assert policy.victim(lambda k, pinned=pinned: k not in pinned) in resident - pinned
                        policy.remove(victim)
                        resident.remove(victim)
                    policy.insert(key)
                    resident.add(key)
                pinned.add(key)
    order = []
    while resident:
        order.append(policy.victim(always))
        policy.remove(order[-1])
        resident.remove(order[-1])
    assert policy.victim(always) is None


@names
def test_an_empty_policy_has_no_victim(name: str):
    assert make(name).victim(always) is None


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    num_slots=st.integers(4, 18),
    concurrency=st.integers(1, 2),
)
def test_no_policy_is_better_than_belady(seed: int, lengths: list[int], num_slots: int, concurrency: int):
    trace = random_trace(seed, lengths)
    best = replay(trace, "belady", num_slots, concurrency=concurrency)
    for name in POLICIES:
        assert replay(trace, name, num_slots, concurrency=concurrency).num_fetches >= best.num_fetches, name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("concurrency", [1, 3])
def test_segment_is_not_worse_than_lru_where_requests_have_their_own_experts(seed: int, concurrency: int):
    trace = local_trace(seed, [60] * 6)
    for share in (0.1, 0.25, 0.5):
        num_slots = round(share * trace.num_keys)
        rates = {name: replay(trace, name, num_slots, concurrency=concurrency).hit_rate for name in ("segment", "lru")}
        assert rates["segment"] >= rates["lru"], (share, rates)


def test_belady_gives_up_what_is_used_last_and_first_of_all_what_never_is():
    policy = BeladyPolicy(3, LAYERS, NUM_EXPERTS)
    policy.foresee({A: [0, 9], B: [0, 4], C: [0]})
    policy.observe(1, [0], [[0, 1, 2]], False)
    for key in (A, B, C):
        policy.insert(key)
    assert policy.victim(always) == C
    assert policy.victim(lambda key: key != C) == A


def test_lru_gives_up_the_least_recently_used():
    policy = make("lru")
    for key in (A, B, C):
        policy.insert(key)
    policy.touch(A)
    assert policy.victim(always) == B
    assert policy.victim(lambda key: key != B) == C


def test_slru_gives_up_what_was_used_once_first():
    policy = make("slru")
    for key in (A, B):
        policy.insert(key)
    policy.touch(A)
    policy.insert(C)
    assert policy.victim(always) == B
    assert policy.victim(lambda key: key not in (B, C)) == A


def test_lfu_counts_uses_and_forgets_them_in_time():
    policy = make("lfu")
    policy.insert(A)
    policy.touch(A)
    policy.insert(B)
    assert policy.victim(always) == B
    for _ in range(200):  # passes
        policy.observe(1, [0], [[3]], False)
    policy.touch(B)
    assert policy.victim(always) == A


def test_least_stale_gives_up_what_the_pass_went_by_then_the_farthest():
    policy = make("least_stale")
    first, stale, ahead = ExpertKey(1, 0), ExpertKey(2, 1), ExpertKey(5, 2)
    for key in (first, stale, ahead):
        policy.observe(key.layer, [0], [[key.expert]], False)
        policy.insert(key)
    policy.observe(1, [0], [[0]], False)
    policy.touch(first)
    policy.observe(2, [0], [[7]], False)
    assert policy.victim(always) == stale
    policy.remove(stale)
    assert policy.victim(always) == first  # its layer has run: a whole pass away
    policy.remove(first)
    assert policy.victim(always) == ahead


def run_tokens(policy, request: int, experts: list[int], num_tokens: int) -> None:
    for _ in range(num_tokens):
        for layer in LAYERS:
            policy.observe(layer, [request], [experts], False)


def test_segment_keeps_what_a_running_request_uses_and_drops_it_when_the_request_ends():
    policy = make("segment")
    for _ in range(30):
        for layer in LAYERS:
            policy.observe(layer, [10, 20], [[0, 1], [2, 3]], False)
    for key in (A, C):
        policy.insert(key)
    run_tokens(policy, 20, [2, 3], 1)
    policy.observe(2, [20], [[2, 3]], False)
    policy.ended(10)
    assert policy.victim(always) == A
    run_tokens(policy, 30, [0, 1], 5)
    policy.ended(20)
    policy.observe(2, [30], [[0, 1]], False)
    assert policy.victim(always) == C
    policy.ended(99)  # never seen


def test_segment_prefers_the_layer_that_comes_next():
    policy = make("segment")
    run_tokens(policy, 0, [0, 1], 30)
    near, far = ExpertKey(5, 0), ExpertKey(1, 0)
    for key in (near, far):
        policy.insert(key)
    for layer in (1, 2):
        policy.observe(layer, [0], [[0, 1]], False)
    assert policy.victim(always) == far


def test_segment_gives_up_last_what_this_step_is_known_to_use_until_its_layer_has_begun():
    policy = make("segment")
    run_tokens(policy, 0, [0, 1], 30)
    used, sure, surer = ExpertKey(5, 0), ExpertKey(5, 7), ExpertKey(2, 7)
    for key in (used, sure, surer):  # those of expert 7 are least expected
        policy.insert(key)
    assert policy.victim(always) in (sure, surer)
    policy.will_use([[], [surer], [sure]])
    policy.observe(1, [0], [[0, 1]], False)
    assert policy.victim(always, sparing=True) == policy.victim(always) == used
    assert policy.victim(lambda key: key != used, sparing=True) is None
    assert policy.victim(lambda key: key != used) == sure  # wanted later than the other
    policy.observe(2, [0], [[7, 1]], False)
    assert policy.victim(always, sparing=True) == surer
    policy.observe(5, [0], [[7, 1]], False)
    assert policy.victim(lambda key: key == sure, sparing=True) == sure


@names
def test_a_policy_may_be_told_what_a_step_is_sure_to_use(name: str):
    policy = make(name)
    policy.insert(A)
    policy.will_use([[A], [], []])
    assert policy.victim(always) == A


def test_segment_finds_the_least_expected_among_many_one_after_the_other():
    policy = POLICIES["segment"](40, LAYERS, 64)
    rng = random.Random(3)
    keys = [ExpertKey(layer, expert) for layer in LAYERS for expert in range(64)]
    for _ in range(200):
        for layer in LAYERS:
            policy.observe(layer, [0], [[min(63, int(rng.expovariate(0.1))) for _ in range(2)]], False)
    resident = rng.sample(keys, 40)
    for key in resident:
        policy.insert(key)
    policy.observe(1, [0], [[0, 1]], False)
    pinned = set(rng.sample(resident, 5))
    values = {}
    for key in resident:
        policy.victim(always)  # ranks
        values[key] = policy._values_at[LAYERS.index(key.layer) * 64 + key.expert]
    order = []
    while (victim := policy.victim(lambda key: key not in pinned)) is not None:
        order.append(victim)
        policy.remove(victim)
    assert set(order) == set(resident) - pinned
    assert [values[key] for key in order] == sorted(values[key] for key in order)


@pytest.mark.parametrize(("name", "num_kept"), [("segment", 16), ("lru", 0)])
def test_a_long_prompt_takes_its_share_of_the_slots_from_a_request_that_decodes_and_no_more(name: str, num_kept: int):
    layers, num_slots = range(8), 32
    policy = POLICIES[name](num_slots, layers, NUM_EXPERTS)
    decoding = [ExpertKey(layer, expert) for layer in layers for expert in (0, 1)]
    resident = set(decoding)
    for key in decoding:
        policy.insert(key)
    for _ in range(20):
        for layer in layers:
            policy.observe(layer, [0], [[0, 1]], False)
    for _ in range(3):  # chunks of request 1
        for layer in layers:
            policy.observe(layer, [1] * 3, [[2, 3], [4, 5], [6, 7]], True)
            call = [ExpertKey(layer, expert) for expert in range(2, NUM_EXPERTS)]
            for key in call:
                if key in resident:
                    policy.touch(key)
                    continue
                if len(resident) == num_slots:
                    victim = policy.victim(lambda k, call=call: k not in call)
                    policy.remove(victim)
                    resident.remove(victim)
                policy.insert(key)
                resident.add(key)
    assert len(resident.intersection(decoding)) == num_kept
