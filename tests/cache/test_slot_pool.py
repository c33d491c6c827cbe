from __future__ import annotations

import ctypes

import pytest

from cache.slot_pool import SlotPool


def test_slots_are_aligned_distinct_and_as_many_as_asked_for():
    pool = SlotPool(3, 8192)
    slots = [pool.take() for _ in range(3)]
    assert sorted(slots) == [0, 1, 2]
    assert pool.take() is None
    for slot in slots:
        address = ctypes.addressof(ctypes.c_char.from_buffer(pool.buffer(slot)))
        assert address % 4096 == 0
        pool.buffer(slot)[:] = bytes([slot]) * 8192
    assert [pool.buffer(slot)[8191] for slot in slots] == slots
    pool.give(slots[1])
    assert pool.free_slots() == {slots[1]}


@pytest.mark.parametrize(("num_slots", "nbytes"), [(0, 4096), (1, 1000)])
def test_impossible_pools_are_refused(num_slots: int, nbytes: int):
    with pytest.raises(ValueError):
        SlotPool(num_slots, nbytes)


def test_a_slot_given_back_twice_is_noticed():
    pool = SlotPool(2, 4096)
    slot = pool.take()
    assert slot is not None
    pool.give(slot)
    pool.give(slot)
    with pytest.raises(AssertionError, match="free twice"):
        pool.free_slots()
