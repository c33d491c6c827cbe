from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cache.replay import replay
from cache.trace import RoutingTrace, concatenate, in_turns
from engine.config import SchedulerConfig
from engine.schedule_replay import ScheduledTrace, replay_scheduled
from engine.signatures import ExpertSignatures

NUM_EXPERTS = 8


def trace_of(lengths: list[int], num_prompt: int = 0, domain: str = "", group: int = 0, seed: int = 0) -> RoutingTrace:
    """Tokens of a domain are routed to two of its four experts."""
    rng = np.random.default_rng(seed)
    num = sum(lengths)
    ids = np.stack([[rng.permutation(4)[:2] + 4 * group for _ in range(3)] for _ in range(num)]).astype(np.uint8)
    return RoutingTrace(
        ids=ids,
        seq_off=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        num_prompt=np.full(len(lengths), num_prompt, dtype=np.int64),
        num_experts=NUM_EXPERTS,
        layers=(0, 1, 2),
        domains=(domain,) * len(lengths),
    )


@pytest.mark.parametrize("policy", ["fcfs", "expert-aware"])
@pytest.mark.parametrize("num_prompt", [0, 5])
def test_every_token_is_computed_once_and_in_its_requests_order(policy: str, num_prompt: int):
    trace = trace_of([7, 12, 5, 9, 30], num_prompt)
    config = SchedulerConfig(policy=policy, max_num_seqs=4, max_step_seqs=2, max_num_batched_tokens=6)
    scheduled = ScheduledTrace(trace, config, frozenset)
    rows: list[int] = []
    ended: list[int] = []
    for step in scheduled.steps():
        scheduled.now_s += 0.1
        assert len(set(step.requests)) <= 2
        rows += step.rows
        ended += step.ended
    assert sorted(rows) == list(range(trace.num_tokens))
    assert sorted(ended) == list(range(5))
    for first, last in zip(trace.seq_off[:-1], trace.seq_off[1:], strict=True):
        of_request = [row for row in rows if first <= row < last]
        assert of_request == sorted(of_request)


def test_first_come_first_served_reads_what_a_plain_replay_does():
    trace = trace_of([6, 14, 9, 4, 11])
    config = SchedulerConfig(policy="fcfs", max_num_seqs=2)
    scheduled, num_tokens = replay_scheduled(trace, "lru", 9, config)
    assert num_tokens == trace.num_tokens
    assert scheduled.num_fetches == replay(trace, "lru", 9, concurrency=2).num_fetches


def test_groups_by_experts_read_less_where_domains_use_different_ones():
    kinds = [trace_of([40] * 6, domain=str(group), group=group, seed=group) for group in range(2)]
    trace = in_turns(concatenate(kinds))
    assert trace.domains[:4] == ("0", "1", "0", "1")
    fcfs, num_tokens = replay_scheduled(trace, "segment", 13, SchedulerConfig(policy="fcfs", max_num_seqs=4))
    aware, same = replay_scheduled(trace, "segment", 13, SchedulerConfig(max_num_seqs=12, max_step_seqs=4))
    assert num_tokens == same == trace.num_tokens
    assert aware.num_fetches < 0.7 * fcfs.num_fetches


def test_groups_by_their_next_tokens_read_less_where_routing_follows_the_token():
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 12, size=24 * 60)
    paths = np.stack([[rng.permutation(NUM_EXPERTS)[:2] for _ in range(3)] for _ in range(12)])
    trace = RoutingTrace(
        ids=paths[tokens].astype(np.uint8),
        seq_off=np.arange(25, dtype=np.int64) * 60,
        num_prompt=np.full(24, 1, dtype=np.int64),
        num_experts=NUM_EXPERTS,
        layers=(0, 1, 2),
        domains=("",) * 24,
        token_ids=tokens.astype(np.int64),
    )
    config = SchedulerConfig(max_num_seqs=24, max_step_seqs=4)
    knowing, num_tokens = replay_scheduled(trace, "segment", 8, config)
    guessing, same = replay_scheduled(replace(trace, token_ids=None), "segment", 8, config)
    assert num_tokens == same == trace.num_tokens
    assert knowing.num_fetches < 0.8 * guessing.num_fetches


def test_a_run_while_some_wait_ends_when_none_does():
    trace = trace_of([10] * 8)
    _, num_tokens = replay_scheduled(
        trace, "lru", 12, SchedulerConfig(policy="fcfs", max_num_seqs=2), while_waiting=True
    )
    assert num_tokens == 60


def test_belady_cannot_choose_what_it_changes():
    with pytest.raises(ValueError, match="belady"):
        replay_scheduled(trace_of([3]), "belady", 4, SchedulerConfig())


# ---- what is expected of a request -----------------------------------------------------------------------------------


def test_a_request_is_expected_to_do_what_it_did_of_late():
    signatures = ExpertSignatures(2, 4, 1)
    for _ in range(40):
        signatures.observe([1], [5], np.asarray([[[0], [3]]]))
    uses = signatures.uses([1])[0]
    assert uses.shape == (8,)
    assert uses[0] > 0.8
    assert uses[4 + 3] > 0.8
    assert uses[1] < 0.05
    for _ in range(10):
        signatures.observe([1], [5], np.asarray([[[2], [3]]]))
    uses = signatures.uses([1])[0]
    assert uses[2] > 0.5 > uses[0] > 0.1


def test_a_chunk_counts_as_its_tokens_one_by_one():
    rng = np.random.default_rng(0)
    chosen = np.stack([[rng.permutation(6)[:2] for _ in range(3)] for _ in range(20)])
    at_once, one_by_one = ExpertSignatures(3, 6, 2), ExpertSignatures(3, 6, 2)
    at_once.observe([1] * 20, list(range(20)), chosen)
    for i in range(20):
        one_by_one.observe([1], [i], chosen[i : i + 1])
    np.testing.assert_allclose(at_once._counts[1], one_by_one._counts[1], rtol=1e-5)
    np.testing.assert_allclose(at_once.uses([1]), one_by_one.uses([1]), rtol=0.02, atol=1e-3)


def test_a_request_that_has_not_run_is_expected_to_go_where_its_tokens_went():
    signatures = ExpertSignatures(1, 8, 1)
    for _ in range(12):
        signatures.observe([1, 2], [10, 20], np.asarray([[[3]], [[6]]]))
    signatures.expect(3, [20, 20, 99])
    fresh, unknown = signatures.uses([3, 4])
    assert fresh[6] > 0.9
    assert fresh[3] < 0.1
    assert unknown.argmax() in (3, 6)
    signatures.ended(3)
    np.testing.assert_array_equal(signatures.uses([3])[0], unknown)


def test_a_request_whose_next_token_is_known_is_expected_to_go_where_that_token_went():
    signatures = ExpertSignatures(1, 8, 1)
    for _ in range(30):
        signatures.observe([1, 1, 2, 2], [10, 11, 10, 20], np.asarray([[[3]], [[5]], [[3]], [[6]]]))
    by_itself = signatures.uses([2])[0]
    assert 0.3 < by_itself[3] < 0.7
    known, other, never_seen, unknown = signatures.uses([2, 2, 2, 2], [10, 11, 99, None])
    assert known[3] > 0.85
    assert other[5] > 0.85
    np.testing.assert_array_equal(never_seen, by_itself)
    np.testing.assert_array_equal(unknown, by_itself)


def test_a_token_seen_once_is_trusted_less_than_one_seen_often():
    signatures = ExpertSignatures(1, 8, 1)
    for _ in range(30):
        signatures.observe([1, 1], [10, 11], np.asarray([[[3]], [[5]]]))
    signatures.observe([2], [12], np.asarray([[[7]]]))
    often, once = signatures.uses([1, 1], [10, 12])
    assert 0.2 < once[7] < often[3]


def test_only_so_many_tokens_are_remembered():
    signatures = ExpertSignatures(1, 4, 1)
    for token in range(5000):
        signatures.observe([1], [token], np.asarray([[[token % 4]]]))
    assert len(signatures._of_token) == len(signatures._num_seen) == 4096
    assert signatures._num_seen.keys() == signatures._of_token.keys()


def test_what_the_signatures_say_is_a_share():
    signatures = ExpertSignatures(2, 5, 2)
    rng = np.random.default_rng(1)
    for i in range(300):
        signatures.observe([i % 3], [i % 7], np.stack([[rng.permutation(5)[:2] for _ in range(2)]]))
    uses = signatures.uses([0, 1, 2])
    assert (uses >= 0).all()
    assert (uses <= 1.0001).all()
    np.testing.assert_allclose(uses.reshape(3, 2, 5).sum(axis=2), 2.0, rtol=0.02)
