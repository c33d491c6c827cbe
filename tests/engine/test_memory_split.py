"""Who gets a device's memory: found by hand where that can be done, and what must hold of every answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.memory_split import Need, Rates, Split, split_memory, step_s

GIB = 1024**3
# of Qwen3-30B-A3B's shape in int4
QWEN = Need(
    record_nbytes=2_700_000,
    num_layers=48,
    num_experts=128,
    num_active=8,
    dense_nbytes=2 * GIB,
    kv_token_nbytes=98_304,
    context=2048,
    longest=8192,
    max_seqs=32,
)
RATES = Rates(memory=1e12, link=25e9)


def linear(num_slots: int) -> float:
    """Nothing is used more than anything else."""
    return min(1.0, num_slots / (48 * 128))


def split(nbytes: int, need: Need = QWEN, rates: Rates = RATES) -> Split:
    found = split_memory(nbytes, need, rates, linear)
    assert found is not None
    return found


def test_a_step_reads_dense_weights_experts_keys_and_values_and_what_it_misses_again():
    need = replace(QWEN, record_nbytes=10, num_layers=2, num_experts=4, num_active=2, dense_nbytes=100, context=3)
    need = replace(need, kv_token_nbytes=1.0)
    rates = Rates(memory=10.0, link=5.0)
    # two of four experts each: of two requests 4 (1 - 1/4) = 3 distinct ones in each layer
    assert step_s(1, 1.0, need, rates) == pytest.approx((100 + 40 + 3) / 10)
    assert step_s(2, 0.5, need, rates) == pytest.approx((100 + 60 + 6) / 10 + 30 / 5)


def test_where_all_experts_fit_keys_and_values_get_the_rest():
    found = split(40 * GIB)
    assert found.num_slots == 48 * 128
    assert found.num_seqs == 32


def test_a_slower_link_gives_experts_more():
    fast, slow = (split(12 * GIB, rates=replace(RATES, link=link)) for link in (400e9, 4e9))
    assert slow.num_slots >= fast.num_slots
    assert slow.kv_nbytes <= fast.kv_nbytes
    assert fast.num_seqs > 1


def test_the_longest_request_fits_always():
    for nbytes in (2 * GIB, 8 * GIB, 30 * GIB):
        assert split(nbytes).kv_nbytes >= QWEN.longest * QWEN.kv_token_nbytes


def test_what_cannot_hold_one_request_and_one_expert_is_no_split():
    longest = int(QWEN.longest * QWEN.kv_token_nbytes)
    assert split_memory(longest + QWEN.record_nbytes - 1, QWEN, RATES, linear) is None
    assert split(longest + QWEN.record_nbytes).num_slots == 1


@given(st.integers(1, 40), st.floats(1e9, 1e12), st.integers(1, 64))
def test_no_other_number_of_requests_serves_more_and_nothing_is_given_twice(gib: int, link: float, max_seqs: int):
    need, rates = replace(QWEN, max_seqs=max_seqs), replace(RATES, link=link)
    found = split(gib * GIB, need, rates)
    assert found.kv_nbytes + found.num_slots * need.record_nbytes <= gib * GIB
    assert 1 <= found.num_seqs <= max_seqs
    for num_seqs in range(1, max_seqs + 1):
        kv_nbytes = int(max(num_seqs * need.context, need.longest) * need.kv_token_nbytes)
        num_slots = min((gib * GIB - kv_nbytes) // need.record_nbytes, 48 * 128)
        if num_slots >= 1:
            speed = num_seqs / step_s(num_seqs, linear(num_slots), need, rates)
            assert speed <= found.tokens_per_s * (1 + 1e-12)
