"""The native transfer alone: order, neighbours, retries and faults. A slow link holds reads back where order counts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError, ExpertStore
from cache.native_transfer import NativeTransfer
from cache.packed_file import read_packed_header
from cache.slot_pool import SlotPool
from cache.transfer_queue import Ticket
from tests.cache.conftest import KEYS, RECORD_NBYTES, record_of

SLOW = RECORD_NBYTES / 0.03  # 30 ms a record


class Reader:
    """Submits keys to slots of their own and keeps what is told, in order."""

    def __init__(self, path: Path, depth: int = 2, link_bandwidth: float | None = None) -> None:
        self.store = ExpertStore(path)
        self.pool = SlotPool(len(KEYS), RECORD_NBYTES)
        self.transfer = NativeTransfer(self.store, depth, link_bandwidth=link_bandwidth)
        self.told: list[tuple[ExpertKey, ExpertReadError | None]] = []

    def submit(self, key: ExpertKey, benefit: float | None = None) -> Ticket:
        buffer = self.pool.buffer(KEYS.index(key))
        return self.transfer.submit(key, buffer, lambda error: self.told.append((key, error)), benefit=benefit)

    def wait_for(self, num: int) -> list[ExpertKey]:
        """-> the keys told of, after so many have been."""
        self.transfer.send()
        with self.transfer.arrival:
            while len(self.told) < num:
                self.transfer.arrival.wait()
        return [key for key, _ in self.told]

    def error(self, key: ExpertKey) -> str:
        return str(dict(self.told)[key])


@pytest.fixture
def open_reader(packed: Path) -> Iterator[Callable[..., Reader]]:
    opened: list[Reader] = []

    def open_one(**kwargs: object) -> Reader:
        opened.append(Reader(packed, **kwargs))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for one in opened:
        one.transfer.close()
        one.store.close()


def apart(num: int) -> list[ExpertKey]:
    """Keys that are no neighbours."""
    return KEYS[::2][:num]


def test_records_arrive_whole_in_their_slots(open_reader):
    one = open_reader()
    for key in KEYS:
        one.submit(key)
    assert sorted(one.wait_for(len(KEYS))) == KEYS
    for slot, key in enumerate(KEYS):
        assert bytes(one.pool.buffer(slot)) == record_of(key)
    assert {error for _, error in one.told} == {None}
    assert (one.transfer.num_reads, one.transfer.in_flight_nbytes) == (len(KEYS), 0)


def test_what_is_sent_together_and_lies_together_is_one_read(open_reader):
    one = open_reader()
    for key in (KEYS[3], KEYS[1], KEYS[2], KEYS[6]):
        one.submit(key)
    one.wait_for(4)
    (disk,) = one.transfer.link_stats().values()
    assert disk.demand_nbytes == 4 * RECORD_NBYTES
    assert sum(disk.demand_s.counts) == 2  # reads


def test_demand_goes_first_then_by_benefit(open_reader):
    one = open_reader(depth=1, link_bandwidth=SLOW)
    first, low, high, waited = apart(4)
    one.submit(first)
    one.transfer.send()  # under way, and cannot be overtaken
    time.sleep(0.01)
    one.submit(low, 0.1)
    one.submit(high, 0.9)
    one.submit(waited)
    assert one.wait_for(4) == [first, waited, high, low]
    assert one.transfer.num_ahead == 2


def test_a_prefetch_that_is_waited_for_overtakes_the_others(open_reader):
    one = open_reader(depth=1, link_bandwidth=SLOW)
    first, high, low = apart(3)
    one.submit(first)
    one.transfer.send()
    time.sleep(0.01)
    one.submit(high, 0.9)
    ticket = one.submit(low, 0.1)
    one.transfer.promote(ticket)
    assert one.wait_for(3) == [first, low, high]


def test_only_what_nobody_waits_for_and_has_not_begun_is_cancelled(open_reader):
    one = open_reader(depth=1, link_bandwidth=SLOW)
    first, ahead, waited = apart(3)
    begun = one.submit(first, 0.5)
    one.transfer.send()
    time.sleep(0.01)
    tickets = one.submit(ahead, 0.5), one.submit(waited)
    assert [one.transfer.cancel(ticket) for ticket in (begun, *tickets)] == [False, True, False]
    assert one.wait_for(2) == [first, waited]
    one.transfer.close()
    assert len(one.told) == 2
    assert one.transfer.num_cancelled == 1


def test_a_link_carries_one_record_after_the_other(open_reader):
    one = open_reader(depth=4, link_bandwidth=SLOW)
    began = time.monotonic()
    for key in apart(5):
        one.submit(key)
    one.wait_for(5)
    assert time.monotonic() - began > 5 * 0.03


def test_closing_finishes_what_was_submitted_and_tells_of_it(open_reader):
    one = open_reader(link_bandwidth=SLOW)
    for key in apart(4):
        one.submit(key)
    one.transfer.close()
    assert sorted(key for key, _ in one.told) == apart(4)
    with pytest.raises(RuntimeError, match="closed"):
        one.submit(KEYS[1])
    one.transfer.close()


def test_closing_ends_threads_that_may_not_read_beside_the_last_ones(open_reader):
    one = open_reader(depth=8, link_bandwidth=SLOW)
    for key in apart(4):
        one.submit(key, 0.1)  # so unsure that only a few threads may read at once: the others go on waiting
    one.transfer.close()
    assert sorted(key for key, _ in one.told) == apart(4)


def test_a_record_with_a_flipped_bit_is_read_twice_and_its_neighbours_once(open_reader, packed: Path):
    header = read_packed_header(packed)
    with packed.open("r+b") as file:
        file.seek(header.data_offset + 2 * RECORD_NBYTES + 77)
        file.write(b"\xff")
    one = open_reader()
    for key in KEYS[1:4]:
        one.submit(key)
    one.wait_for(3)
    assert one.error(KEYS[2]) == "expert record layers.0.experts.2: checksum does not match, the packed file is corrupt"
    assert [one.error(key) for key in (KEYS[1], KEYS[3])] == ["None", "None"]
    assert (one.transfer.num_retries, one.transfer.num_errors) == (1, 1)


def test_a_short_read_says_how_short(open_reader, packed: Path):
    one = open_reader()
    header = read_packed_header(packed)
    os.truncate(packed, header.data_offset + (len(KEYS) - 1) * RECORD_NBYTES + 4096)
    one.submit(KEYS[-2])
    one.submit(KEYS[-1])
    one.wait_for(2)
    assert one.error(KEYS[-2]) == "None"
    assert one.error(KEYS[-1]).endswith(f"short read, 4096 of {RECORD_NBYTES} bytes")


def test_a_failing_disk_is_named_and_works_again_when_it_does(open_reader):
    one = open_reader()
    whole = os.dup(one.store.fileno())
    broken = os.open("/proc/self/mem", os.O_RDONLY)  # its first pages are never mapped: EIO
    os.dup2(broken, one.store.fileno())
    one.submit(KEYS[0])
    one.wait_for(1)
    assert one.error(KEYS[0]).endswith("disk read failed (Input/output error)")
    os.dup2(whole, one.store.fileno())
    one.told.clear()
    one.submit(KEYS[0])
    one.wait_for(1)
    assert one.told == [(KEYS[0], None)]
    os.close(whole)
    os.close(broken)
