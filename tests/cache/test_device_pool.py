"""The cache over a simulated device: the right bytes when compute runs late, copies are torn and streams overtake."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cache.device.device import DeviceOutOfMemory, Region
from cache.device.sim import Adversary, SimDevice
from cache.device_pool import DevicePool, SlotBuffer
from cache.device_source import DeviceSource
from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertStore
from cache.pinned_tier import PinnedTier
from cache.transfer import TransferEngine
from tests.cache.conftest import KEYS, RECORD_NBYTES, record_of

ADVERSARIES = {
    "fair": Adversary(),
    "late compute": Adversary(seed=1, compute_delay_s=0.004),
    "late copies in pieces": Adversary(seed=2, copy_delay_s=0.004, num_pieces=5),
    "all late": Adversary(seed=3, copy_delay_s=0.002, compute_delay_s=0.002, num_pieces=3),
}


class _ForgetfulPool(DevicePool):
    """Hands a slot over without saying who still reads it."""

    def buffer(self, slot: int) -> SlotBuffer:
        return SlotBuffer(self.region(slot), (), lambda event: self._written.__setitem__(slot, event))


class _HastyPool(DevicePool):
    """Lets compute begin without waiting for the copy."""

    def handed_out(self, slots) -> None:
        for _ in slots:
            pass


class OnDevice:
    """A cache whose slots are on a device, and a thread's worth of compute that checks what it reads when it runs."""

    def __init__(
        self,
        path: Path,
        num_slots: int,
        adversary: Adversary,
        *,
        tier_slots: int = 32,
        exclusive: bool = False,
        pool: type[DevicePool] = DevicePool,
    ) -> None:
        self.device = SimDevice(adversary=adversary)
        self.store = ExpertStore(path)
        self.pool = pool(self.device, num_slots, RECORD_NBYTES)
        self.tier = PinnedTier(self.store, tier_slots, self.device.pinned, exclusive=exclusive)
        transfer = TransferEngine(DeviceSource(self.device, self.tier), 4)
        self.cache = ExpertCache(self.store, self.pool, "lru", transfer=transfer)
        self.wrong: list[str] = []
        self.num_computed = 0

    def compute(self, *keys: ExpertKey) -> None:
        """Lease, put the work into the compute stream, and go on at once."""
        with self.cache.acquire(keys) as lease:
            for ready in lease.batches():
                regions = [self.pool.region(slot) for _, slot in ready]
                self.device.compute.run(lambda ready=ready, regions=regions: self._look(ready, regions), regions)

    def _look(self, ready: list[tuple[ExpertKey, int]], regions: list[Region]) -> None:
        for (key, _), region in zip(ready, regions, strict=True):
            self.num_computed += 1
            if bytes(self.pool.memory.memory[region.offset : region.offset + RECORD_NBYTES]) != record_of(key):
                self.wrong.append(f"{key} was computed with other bytes")

    def close(self) -> None:
        self.cache.close()
        self.device.close()
        self.cache.check_integrity()
        self.tier.check_integrity()
        self.store.close()


@pytest.fixture
def open_on(packed: Path) -> Iterator[Callable[..., OnDevice]]:
    opened: list[OnDevice] = []

    def open_one(*args: object, **kwargs: object) -> OnDevice:
        opened.append(OnDevice(packed, *args, **kwargs))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def use_at_random(one: OnDevice, num_calls: int, seed: int = 0) -> int:
    rng = random.Random(seed)
    num = 0
    for _ in range(num_calls):
        layer = rng.randrange(3)
        keys = rng.sample([key for key in KEYS if key.layer == layer], rng.randint(1, 6))
        one.cache.prefetch([(key, rng.random()) for key in rng.sample(KEYS, 2)], distance=1)
        one.compute(*keys)
        num += len(keys)
    one.device.compute.synchronize()
    return num


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize(("num_slots", "tier_slots", "exclusive"), [(12, 24, False), (2, 16, False), (5, 24, True)])
def test_every_ordering_computes_with_the_right_bytes_and_without_a_race(
    open_on, name: str, num_slots: int, tier_slots: int, exclusive: bool
):
    one = open_on(num_slots, ADVERSARIES[name], tier_slots=tier_slots, exclusive=exclusive)
    num = use_at_random(one, 40)
    assert one.num_computed == num
    assert one.wrong == []
    one.device.detector.check()
    assert one.cache.stats().evictions > 0


def test_several_threads_lease_on_one_device(open_on):
    one = open_on(6, ADVERSARIES["all late"])
    threads = [threading.Thread(target=lambda seed=seed: use_at_random(one, 10, seed)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert one.wrong == []
    one.device.detector.check()


def test_a_slot_that_is_reused_before_its_reader_has_run_is_caught(open_on):
    one = open_on(2, ADVERSARIES["late compute"], pool=_ForgetfulPool)
    use_at_random(one, 20)
    assert any("a copy in" in race and "after computing" in race for race in one.device.detector.races)
    assert one.wrong  # and late enough a reader really sees the other expert's bytes


def test_compute_that_does_not_wait_for_the_copy_is_caught(open_on):
    one = open_on(4, ADVERSARIES["late copies in pieces"], pool=_HastyPool)
    use_at_random(one, 5)
    assert any("computing" in race and "after a copy in" in race for race in one.device.detector.races)


def test_a_record_in_pinned_memory_goes_up_by_one_copy_and_is_not_read_again(open_on, monkeypatch):
    one = open_on(2, ADVERSARIES["fair"])
    one.compute(KEYS[0], KEYS[1])
    one.compute(KEYS[2], KEYS[3])
    monkeypatch.setattr(one.store, "read_run", None)
    copies = []
    for stream, _ in one.cache.transfer._source._streams:  # type: ignore[attr-defined]
        copy_in = stream.copy_in
        monkeypatch.setattr(
            stream, "copy_in", lambda to, source, copy_in=copy_in: (copies.append(to), copy_in(to, source))
        )
    one.compute(KEYS[0])
    assert [to.nbytes for to in copies] == [RECORD_NBYTES]
    assert one.tier.num_hits == 1


def test_what_is_waited_for_goes_up_before_what_is_foretold(open_on):
    one = open_on(20, Adversary(bandwidth=RECORD_NBYTES / 0.004))
    order: list[ExpertKey] = []
    residents = one.cache._residents
    arrived = residents.arrived
    residents.arrived = lambda entry, error: (order.append(entry.key), arrived(entry, error))  # type: ignore
    one.cache.prefetch([(key, 0.5) for key in KEYS[8:24:2]], distance=2)
    one.compute(KEYS[0])
    # of what is foretold only what had begun is before it: no more are under way than the queue lets
    assert order.index(KEYS[0]) <= one.cache.transfer.depth


def test_a_device_without_room_for_the_slots_says_so(packed: Path):
    device = SimDevice(memory_nbytes=3 * RECORD_NBYTES)
    with pytest.raises(DeviceOutOfMemory):
        DevicePool(device, 4, RECORD_NBYTES)
    assert DevicePool(device, 3, RECORD_NBYTES).num_free == 3
    device.close()
