"""Reading ahead: what becomes of a prefetch, in which order records come, and what the books say."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue

import pytest

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from cache.prefetcher import Prefetcher
from tests.cache.conftest import KEYS, RECORD_NBYTES


def key(expert: int, layer: int = 0) -> ExpertKey:
    return ExpertKey(layer, expert)


def wait_until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Gate:
    """Holds every read until it is opened, and remembers what was read in which order."""

    def __init__(self, one, monkeypatch) -> None:
        self.open = threading.Event()
        self.order: list[ExpertKey] = []
        read = one.store.read_run

        def read_run(keys, buffers):
            self.order += keys
            assert self.open.wait(5)
            return read(keys, buffers)

        monkeypatch.setattr(one.store, "read_run", read_run)


def test_a_prefetch_that_is_in_place_when_asked_for_is_a_useful_hit(open_either):
    one = open_either(4)
    assert one.cache.prefetch([(key(0), 1.0), (key(1), 0.5)], distance=2) == 2
    wait_until(lambda: one.cache.resident() == {key(0), key(1)})
    assert one.use(key(0)) == [key(0)]
    stats = one.cache.stats()
    assert (stats.decode.hits, stats.fetches) == (1, 2)
    assert (stats.prefetch[2].issued, stats.prefetch[2].useful, stats.prefetch[2].late) == (2, 1, 0)


def test_a_prefetch_that_is_still_on_its_way_is_joined_and_late(open_cache, monkeypatch):
    one = open_cache(4, num_io_threads=1)
    gate = Gate(one, monkeypatch)
    one.cache.prefetch([(key(0), 1.0)], distance=1)
    lease = one.cache.acquire([key(0)])
    gate.open.set()
    assert [k for batch in lease.batches() for k, _ in batch] == [key(0)]
    lease.release()
    stats = one.cache.stats()
    assert (stats.decode.joined, stats.fetches, stats.prefetch[1].late, stats.prefetch[1].useful) == (1, 1, 1, 0)


def test_what_is_here_or_on_its_way_is_not_prefetched_again(open_either):
    one = open_either(4)
    one.use(key(0))
    assert one.cache.prefetch([(key(0), 1.0)], distance=1) == 0
    assert one.cache.stats().fetches == 1


def test_an_unused_prefetch_that_is_evicted_is_wasted(open_either):
    one = open_either(2)
    one.cache.prefetch([(key(0), 1.0)], distance=3)
    wait_until(lambda: key(0) in one.cache.resident())
    one.use(key(1))
    one.use(key(2))
    assert one.cache.stats().prefetch[3].wasted == 1


def test_demand_overtakes_prefetches_that_have_not_begun_and_those_go_by_benefit(open_cache, monkeypatch):
    one = open_cache(12, num_io_threads=1)
    gate = Gate(one, monkeypatch)
    one.cache.prefetch([(key(0), 0.1)], distance=1)
    wait_until(lambda: gate.order == [key(0)])
    one.cache.prefetch([(key(2), 0.2), (key(4), 0.9), (key(6), 0.5)], distance=1)
    lease = one.cache.acquire([key(1, 2)])
    gate.open.set()
    list(lease.batches())
    lease.release()
    wait_until(lambda: len(one.cache.resident()) == 5)
    assert gate.order == [key(0), key(1, 2), key(4), key(6), key(2)]


def test_a_prefetch_that_is_asked_for_overtakes_the_others(open_cache, monkeypatch):
    one = open_cache(12, num_io_threads=1)
    gate = Gate(one, monkeypatch)
    one.cache.prefetch([(key(0), 0.1)], distance=1)
    wait_until(lambda: gate.order == [key(0)])
    one.cache.prefetch([(key(2), 0.9), (key(4), 0.2)], distance=1)
    lease = one.cache.acquire([key(4)])
    gate.open.set()
    list(lease.batches())
    lease.release()
    wait_until(lambda: len(one.cache.resident()) == 3)
    assert gate.order == [key(0), key(4), key(2)]


def test_neighbours_in_the_file_come_in_one_read(open_cache, monkeypatch):
    one = open_cache(12, num_io_threads=1)
    gate = Gate(one, monkeypatch)
    calls: list[list[ExpertKey]] = []
    read = one.store.read_run
    monkeypatch.setattr(one.store, "read_run", lambda keys, buffers: (calls.append(list(keys)), read(keys, buffers))[1])
    with one.cache.acquire([key(7, 2)]) as first:
        wait_until(lambda: calls == [[key(7, 2)]])
        with one.cache.acquire([key(3), key(1), key(2), key(6)]) as second:
            gate.open.set()
            for lease in (first, second):
                list(lease.batches())
    assert sorted(map(tuple, calls[1:])) == [(key(1), key(2), key(3)), (key(6),)]
    one.use(*KEYS[:8])  # checks the bytes


def test_prefetches_are_cancelled_by_layer_and_their_slots_come_back(open_cache, monkeypatch):
    one = open_cache(4, num_io_threads=1)
    gate = Gate(one, monkeypatch)
    one.cache.prefetch([(key(0), 0.1)], distance=1)
    wait_until(lambda: gate.order == [key(0)])
    one.cache.prefetch([(key(1, 1), 0.3), (key(2, 1), 0.2), (key(3, 2), 0.1)], distance=2)
    assert one.cache.cancel_prefetches(1, but={key(2, 1)}) == 1
    gate.open.set()
    wait_until(lambda: one.cache.resident() == {key(0), key(2, 1), key(3, 2)})
    stats = one.cache.stats()
    assert (stats.prefetch[2].cancelled, stats.fetches, stats.num_slots_used) == (1, 3, 3)


def test_demand_takes_the_slot_of_a_prefetch_that_has_not_begun(open_cache, monkeypatch):
    one = open_cache(2, num_io_threads=1)
    gate = Gate(one, monkeypatch)
    one.cache.prefetch([(key(0), 0.2), (key(4), 0.1)], distance=1)
    wait_until(lambda: gate.order == [key(0)])
    lease = one.cache.acquire([key(5, 1)])
    gate.open.set()
    list(lease.batches())
    lease.release()
    assert one.cache.stats().prefetch[1].cancelled == 1


def test_a_prefetch_evicts_nothing_that_is_used_or_to_be_kept(open_either):
    one = open_either(2)
    one.use(key(0))
    with one.cache.acquire([key(1)]) as lease:
        list(lease.batches())
        assert one.cache.prefetch([(key(2), 1.0)], distance=1, keep={key(0)}) == 0
        assert one.cache.resident() == {key(0), key(1)}
        assert one.cache.prefetch([(key(2), 1.0)], distance=1) == 1


def test_a_prefetch_that_cannot_be_read_is_forgotten(open_cache, monkeypatch):
    one = open_cache(2)
    read = one.store.read_run

    def fail(keys, buffers):
        raise OSError("odd")

    monkeypatch.setattr(one.store, "read_run", fail)
    one.cache.prefetch([(key(0), 1.0)], distance=1)
    wait_until(lambda: one.cache.stats().read_errors == 1)
    monkeypatch.setattr(one.store, "read_run", read)
    assert one.use(key(0)) == [key(0)]


class BadReads:
    """Each read waits for its turn, and then fails or not as it is told."""

    def __init__(self, one, monkeypatch) -> None:
        self.num_begun = 0
        self._turns: SimpleQueue[bool] = SimpleQueue()
        read = one.store.read_run

        def read_run(keys, buffers):
            self.num_begun += 1
            if self._turns.get(timeout=5):
                raise OSError("odd")
            return read(keys, buffers)

        monkeypatch.setattr(one.store, "read_run", read_run)

    def fail(self, num_reads: int) -> None:
        for _ in range(num_reads):
            self._turns.put(True)

    def succeed(self) -> None:
        self._turns.put(False)


def test_a_lease_that_joins_a_failing_prefetch_has_it_read_anew(open_cache, monkeypatch):
    one = open_cache(2, num_io_threads=1)
    reads = BadReads(one, monkeypatch)
    one.cache.prefetch([(key(0), 1.0)], distance=1)
    wait_until(lambda: reads.num_begun == 1)
    with one.cache.acquire([key(0)]) as lease:
        reads.fail(2)  # the transfer tries each record twice
        reads.succeed()
        assert [[k for k, _ in batch] for batch in lease.batches()] == [[key(0)]]
    assert (one.cache.stats().decode.joined, one.cache.stats().read_errors) == (1, 1)


def test_a_lease_that_joins_what_a_failed_one_left_behind_has_it_read_anew(open_cache, monkeypatch):
    one = open_cache(4, num_io_threads=1)
    reads = BadReads(one, monkeypatch)
    with one.cache.acquire([key(0), key(5, 2)]) as lease:
        reads.fail(2)
        with pytest.raises(ExpertReadError):
            list(lease.batches())
    wait_until(lambda: reads.num_begun == 3)
    with one.cache.acquire([key(5, 2)]) as lease:
        reads.fail(2)
        reads.succeed()
        assert [[k for k, _ in batch] for batch in lease.batches()] == [[key(5, 2)]]


def test_a_lease_fails_by_its_own_read_and_one_read_anew_is_all_it_gets(open_cache, monkeypatch):
    one = open_cache(2, num_io_threads=1)
    reads = BadReads(one, monkeypatch)
    one.cache.prefetch([(key(0), 1.0)], distance=1)
    wait_until(lambda: reads.num_begun == 1)
    with one.cache.acquire([key(0)]) as lease:
        reads.fail(4)
        with pytest.raises(ExpertReadError, match="odd"):
            list(lease.batches())
    assert reads.num_begun == 4
    with one.cache.acquire([key(1)]) as lease:
        reads.fail(2)
        with pytest.raises(ExpertReadError, match="odd"):
            list(lease.batches())
    assert (reads.num_begun, one.cache.resident()) == (6, frozenset())


def test_a_throttled_link_takes_its_time_one_record_after_the_other(open_either):
    one = open_either(24, link_bandwidth=RECORD_NBYTES * 100)
    started = time.monotonic()
    one.use(*KEYS[:10])
    assert time.monotonic() - started >= 0.099
    started = time.monotonic()
    one.use(*KEYS[:10])  # what is resident crosses no link
    assert time.monotonic() - started < 0.099


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def measured(one, monkeypatch, *, bandwidth: float, layer_s: float, num_layers: int = 3) -> Prefetcher:
    """A prefetcher that has seen a step of `layer_s` a layer on a link of that bandwidth."""
    clock = _Clock()
    prefetcher = Prefetcher(one.cache, num_layers, clock=clock)
    for i in range(2 * num_layers):
        prefetcher.layer_begins(i % num_layers)
        clock.now += layer_s
    monkeypatch.setattr(type(one.cache.transfer), "bandwidth", property(lambda self: bandwidth))
    return prefetcher


def test_no_more_is_admitted_than_the_link_carries_while_layers_compute(open_cache, monkeypatch):
    one = open_cache(24)
    prefetcher = measured(one, monkeypatch, bandwidth=RECORD_NBYTES * 1000, layer_s=0.002)
    assert prefetcher.window_s(1, 2) == pytest.approx(0.004)
    candidates = [(key(expert, 1), 0.9 - 0.1 * expert) for expert in range(8)]
    assert prefetcher.offer(0, 1, candidates) == 2  # 1,000 records a second for 2 ms
    wait_until(lambda: one.cache.resident() == {key(0, 1), key(1, 1)})
    assert prefetcher.offer(0, 2, [(key(expert, 2), 0.5) for expert in range(8)]) == 4


def test_bytes_in_flight_count_against_the_window(open_cache, monkeypatch):
    one = open_cache(24)
    prefetcher = measured(one, monkeypatch, bandwidth=RECORD_NBYTES * 1000, layer_s=0.003)
    gate = Gate(one, monkeypatch)
    lease = one.cache.acquire([key(0), key(1)])
    assert prefetcher.offer(0, 1, [(key(expert, 1), 0.5) for expert in range(8)]) == 1
    gate.open.set()
    list(lease.batches())
    lease.release()


class Steps:
    """Ends steps in half of which compute waits."""

    def __init__(self, one, monkeypatch) -> None:
        self.clock, self.stall_s = _Clock(), 0.0
        monkeypatch.setattr(type(one.cache), "stall_s", property(lambda _: self.stall_s))
        self.prefetcher = Prefetcher(one.cache, 3, clock=self.clock)

    def end(self, num_steps: int = 1, *, with_it: float = 1.0, without: float = 1.0, waits: float = 0.5) -> None:
        """Steps of so many seconds, with foretelling and without."""
        for _ in range(num_steps):
            self.prefetcher.step_begins()
            seconds = with_it if self.prefetcher.is_worth_it else without
            self.clock.now += seconds
            self.stall_s += waits * seconds
            self.prefetcher.step_ends(1)


def test_nothing_is_foretold_where_compute_does_not_wait(open_cache, monkeypatch):
    steps = Steps(open_cache(4), monkeypatch)
    steps.end(10, waits=0.0)
    assert not steps.prefetcher.is_worth_it
    seen = set()
    for _ in range(8):
        steps.end()
        seen.add(steps.prefetcher.is_worth_it)
    assert seen == {True, False}


@pytest.mark.parametrize("is_used", [True, False])
def test_waste_raises_the_bar_and_use_lowers_it(open_cache, monkeypatch, is_used: bool):
    one = open_cache(2)
    steps = Steps(one, monkeypatch)
    before = steps.prefetcher.floor
    assert steps.prefetcher.offer(0, 1, [(key(0, 1), before - 0.01)]) == 0
    for i in range(34):
        one.cache.prefetch([(key(i % 8, 1 + i // 8 % 2), 0.9)], distance=1)
        wait_until(lambda: one.cache.transfer.in_flight_nbytes == 0)
        one.use(*([key(i % 8, 1 + i // 8 % 2)] if is_used else [key(i % 8), key((i + 1) % 8)]))
        steps.end()
    assert (steps.prefetcher.floor < before) == is_used
    assert steps.prefetcher.floor != before


@pytest.mark.parametrize("with_it", [0.8, 1.3])
def test_steps_foretell_where_they_are_faster_with_it_and_else_hardly_ever(open_cache, monkeypatch, with_it: float):
    steps = Steps(open_cache(2), monkeypatch)
    chosen = []
    for _ in range(600):
        chosen.append(steps.prefetcher.is_worth_it)
        steps.end(with_it=with_it)
    assert set(chosen[-200:]) == {True, False}  # what is slower is still tried: loads change
    assert (sum(chosen) > 300) == (with_it < 1.0)


def test_the_certain_are_kept_short_in_the_queue_and_all_come_in_the_end(open_cache, monkeypatch):
    one = open_cache(24, num_io_threads=1)
    prefetcher = Prefetcher(one.cache, 3)
    gate = Gate(one, monkeypatch)
    wanted = [key(expert, 2) for expert in range(8)]
    assert not prefetcher.offer_certain(2, wanted)
    assert one.cache.stats().prefetch[2].issued == 2 * one.cache.transfer.depth
    gate.open.set()
    wait_until(lambda: prefetcher.offer_certain(2, wanted))
    wait_until(lambda: one.cache.resident() == set(wanted))


def test_all_that_the_next_layer_is_sure_to_ask_for_is_queued_behind_what_this_one_waits_for(open_cache, monkeypatch):
    one = open_cache(24, num_io_threads=1)
    prefetcher = Prefetcher(one.cache, 3)
    gate = Gate(one, monkeypatch)
    with one.cache.acquire([key(expert, 0) for expert in range(8)]):
        wanted = [key(expert, 1) for expert in range(8)]
        assert prefetcher.offer_certain(1, wanted)
        gate.open.set()
    wait_until(lambda: one.cache.resident() >= set(wanted))
