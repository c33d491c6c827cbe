from __future__ import annotations

import errno
import random
import threading
import time

import pytest

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from tests.cache.conftest import KEYS


def key(expert: int, layer: int = 0) -> ExpertKey:
    return ExpertKey(layer, expert)


def test_what_was_used_is_resident_and_hits(open_either):
    one = open_either(4)
    assert set(one.use(key(0), key(1))) == {key(0), key(1)}
    assert one.use(key(1)) == [key(1)]
    stats = one.cache.stats()
    assert (stats.decode.queries, stats.decode.hits, stats.fetches) == (3, 1, 2)
    assert (stats.num_slots, stats.num_slots_used) == (4, 2)
    assert one.cache.resident() == {key(0), key(1)}


def test_hits_and_misses_are_counted_by_phase(open_either):
    one = open_either(4)
    one.use(key(0))
    with one.cache.acquire([key(0)], "prefill") as lease:
        list(lease.batches())
    stats = one.cache.stats()
    assert (stats.prefill.queries, stats.prefill.hits) == (1, 1)
    assert (stats.decode.queries, stats.decode.hits) == (1, 0)


def test_the_policy_chooses_whom_to_evict(open_either):
    one = open_either(2, policy="lru")
    one.use(key(0))
    one.use(key(1))
    one.use(key(0))
    one.use(key(2))
    assert one.cache.resident() == {key(0), key(2)}
    assert one.cache.stats().evictions == 1


def test_an_expert_that_hits_is_not_evicted_for_a_miss_of_the_same_call(open_either):
    one = open_either(2)
    one.use(key(0))
    one.use(key(1))
    assert one.use(key(2), key(0))[0] == key(0)  # the least recent one, but pinned before the miss took a slot
    assert one.cache.resident() == {key(0), key(2)}


def test_a_pinned_expert_is_never_evicted(open_either):
    one = open_either(2)
    with one.cache.acquire([key(0)]) as lease:
        list(lease.batches())
        one.use(key(1))
        one.use(key(2))
        one.use(key(3))
        assert key(0) in one.cache.resident()


@pytest.mark.parametrize("num_slots", [1, 2, 3, 7])
def test_experts_that_do_not_fit_are_computed_in_waves(open_either, num_slots: int):
    one = open_either(num_slots)
    keys = [key(expert) for expert in range(8)]
    for _ in range(3):
        assert sorted(one.use(*keys)) == keys
    assert one.cache.stats().waves == 3


def test_a_miss_that_is_in_flight_is_joined_not_fetched_twice(open_cache, monkeypatch):
    one = open_cache(4)
    gate = threading.Event()
    read = one.store.read_run
    monkeypatch.setattr(one.store, "read_run", lambda *args: (gate.wait(5), read(*args))[1])
    first, second = one.cache.acquire([key(0)]), one.cache.acquire([key(0)])
    gate.set()
    slots = [next(lease.batches()) for lease in (first, second)]
    assert slots[0] == slots[1]
    first.release()
    second.release()
    stats = one.cache.stats()
    assert (stats.fetches, stats.decode.joined, stats.decode.hits) == (1, 1, 0)


def test_waiting_for_experts_is_counted_as_stall(open_cache, monkeypatch):
    one = open_cache(4)
    read = one.store.read_run
    monkeypatch.setattr(one.store, "read_run", lambda *args: (time.sleep(0.05), read(*args))[1])
    one.use(key(0))
    assert one.cache.stats().decode.stall_s >= 0.04
    before = one.cache.stats().decode.stall_s
    one.use(key(0))
    assert one.cache.stats().decode.stall_s == before


def test_a_lease_that_is_given_up_while_loading_leaves_the_books_right(open_either):
    one = open_either(2)
    one.cache.acquire([key(0), key(1), key(2)]).release()
    assert one.use(key(3)) == [key(3)]


def test_a_read_that_fails_once_is_tried_again(open_cache, monkeypatch):
    one = open_cache(2)
    read, calls = one.store.read_run, []

    def fail_first(keys, buffers):
        calls.append(keys)
        return [ExpertReadError(keys[0], "disk read failed")] if len(calls) == 1 else read(keys, buffers)

    monkeypatch.setattr(one.store, "read_run", fail_first)
    assert one.use(key(0)) == [key(0)]
    stats = one.cache.stats()
    assert (stats.read_retries, stats.read_errors) == (1, 0)


@pytest.mark.parametrize("error", [ExpertReadError(key(1), "corrupt"), OSError(errno.EIO, "I/O"), ValueError("odd")])
def test_a_read_that_fails_twice_ends_the_lease_with_the_record_named_and_hurts_no_other(
    open_cache, monkeypatch, error: Exception
):
    one = open_cache(2)
    read = one.store.read_run

    def fail(keys, buffers):
        if key(1) in keys:
            raise error
        return read(keys, buffers)

    monkeypatch.setattr(one.store, "read_run", fail)
    for _ in range(3):
        with pytest.raises(ExpertReadError, match=r"layers\.0\.experts\.1"):
            one.use(key(0), key(1), key(2))
    assert one.use(key(0), key(2), key(3))
    assert key(1) not in one.cache.resident()
    assert one.cache.stats().read_errors == 3


def test_an_unknown_policy_is_answered_with_the_known_ones(open_either):
    one = open_either(2)
    with pytest.raises(ValueError, match=r"unknown cache policy 'best'; known: "):
        ExpertCache(one.store, one.pool, "best")


@pytest.mark.parametrize("num_slots", [1, 3, 12])
def test_threads_that_lease_more_than_there_is_never_deadlock(open_either, num_slots: int):
    one = open_either(num_slots)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                keys = rng.sample(KEYS, rng.randint(1, 8))
                assert sorted(one.use(*keys)) == sorted(keys)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


def test_integrity_notices_a_pin_that_was_left(open_either):
    one = open_either(2)
    lease = one.cache.acquire([key(0)])
    list(lease.batches())
    with pytest.raises(AssertionError, match="still pinned"):
        one.cache.check_integrity()
    lease.release()
