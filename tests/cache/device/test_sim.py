"""The simulated device keeps a stream's promises and no others, and finds what no promise orders."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from cache.device import open_device
from cache.device.device import DeviceOutOfMemory, DeviceUnavailable, Region
from cache.device.sim import Adversary, SimArena, SimDevice


@pytest.fixture
def make_device() -> Iterator:
    made: list[SimDevice] = []

    def make(memory_nbytes: int = 1 << 20, **adversary: object) -> SimDevice:
        made.append(SimDevice(memory_nbytes, Adversary(**adversary)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for device in made:
        device.close()


def filled(device: SimDevice, nbytes: int, value: int) -> memoryview:
    memory = device.pinned(nbytes)
    memory[:] = bytes([value]) * nbytes
    return memory


def whole(arena: SimArena) -> Region:
    return Region(arena, 0, arena.nbytes)


def test_a_stream_runs_in_order_whatever_the_delays(make_device):
    device = make_device(compute_delay_s=0.002)
    order: list[int] = []
    for i in range(20):
        device.compute.run(lambda i=i: order.append(i))
    assert len(order) < 20  # put in, not run: calls do not wait
    device.compute.synchronize()
    assert order == list(range(20))


def test_independent_streams_overtake_one_another_in_more_than_one_way(make_device):
    orders = set()
    for seed in range(8):
        device = make_device(seed=seed, copy_delay_s=0.003, compute_delay_s=0.003)
        order: list[str] = []
        streams = [device.stream(name) for name in "ab"]
        for stream in streams:
            stream.run(lambda stream=stream, order=order: order.append(stream.name))
        for stream in streams:
            stream.synchronize()
        orders.add("".join(order))
    assert orders == {"ab", "ba"}


def test_what_waits_for_an_event_runs_after_it(make_device):
    for seed in range(5):
        device = make_device(seed=seed, copy_delay_s=0.005)
        order: list[str] = []
        copies = device.stream("copies")
        copies.run(lambda order=order: order.append("copy"))
        device.compute.wait(copies.record())
        device.compute.run(lambda order=order: order.append("compute"))
        device.compute.synchronize()
        assert order == ["copy", "compute"]


def test_a_copy_in_and_out_carries_the_bytes(make_device):
    device = make_device(num_pieces=7)
    arena, back = device.allocate(8192), device.pinned(4096)
    stream = device.stream("copies")
    stream.copy_in(Region(arena, 4096, 4096), filled(device, 4096, 5))
    stream.copy_out(back, Region(arena, 4096, 4096))
    stream.synchronize()
    assert bytes(back) == bytes([5]) * 4096
    assert bytes(arena.memory[:4096]) == bytes(4096)
    device.detector.check()


def test_a_read_that_no_event_orders_after_a_copy_is_a_race_even_if_it_came_late_enough(make_device):
    device = make_device()
    arena = device.allocate(4096)
    copies = device.stream("copies")
    copies.copy_in(whole(arena), filled(device, 4096, 1))
    time.sleep(0.02)
    device.compute.run(lambda: None, reads=[whole(arena)])
    with pytest.raises(AssertionError, match=r"computing on 'compute'.*is not ordered after a copy in on 'copies'"):
        device.detector.check()


def test_two_reads_are_no_race_nor_are_accesses_of_different_bytes(make_device):
    device = make_device()
    arena = device.allocate(8192)
    other = device.stream("other")
    device.compute.run(lambda: None, reads=[whole(arena)])
    other.run(lambda: None, reads=[whole(arena)])
    device.compute.run(lambda: None)
    third = device.allocate(8192)
    other.copy_in(Region(third, 0, 4096), filled(device, 4096, 1))
    device.compute.run(lambda: None, writes=[Region(third, 4096, 4096)])
    device.detector.check()


def test_a_write_before_the_last_reader_is_a_race_unless_it_waits_for_it(make_device):
    for waits in (True, False):
        device = make_device()
        arena = device.allocate(4096)
        copies = device.stream("copies")
        device.compute.run(lambda: None, reads=[whole(arena)])
        event = device.compute.record()
        if waits:
            copies.wait(event)
        copies.copy_in(whole(arena), filled(device, 4096, 1))
        assert bool(device.detector.races) is not waits


def test_an_event_orders_only_what_came_before_it(make_device):
    device = make_device()
    arena = device.allocate(4096)
    copies = device.stream("copies")
    event = device.compute.record()
    device.compute.run(lambda: None, reads=[whole(arena)])
    copies.wait(event)  # too early a one
    copies.copy_in(whole(arena), filled(device, 4096, 1))
    assert device.detector.races


def test_a_thread_that_waited_for_an_event_is_ordered_after_it(make_device):
    device = make_device()
    arena = device.allocate(4096)
    copies = device.stream("copies")
    copies.copy_in(whole(arena), filled(device, 4096, 1))
    copies.synchronize()
    device.compute.run(lambda: None, reads=[whole(arena)])
    device.detector.check()


def test_order_is_inherited_through_a_third_stream(make_device):
    device = make_device()
    arena = device.allocate(4096)
    first, second = device.stream("first"), device.stream("second")
    first.copy_in(whole(arena), filled(device, 4096, 1))
    second.wait(first.record())
    device.compute.wait(second.record())
    device.compute.run(lambda: None, reads=[whole(arena)])
    device.detector.check()


def test_pinned_memory_that_changes_before_its_copy_has_run_is_found(make_device):
    device = make_device(copy_delay_s=0.05, num_pieces=3)
    arena, memory = device.allocate(4096), filled(device, 4096, 1)
    stream = device.stream("copies")
    stream.copy_in(whole(arena), memory)
    memory[4000] = 9
    stream.synchronize()
    assert any("pinned memory changed" in race for race in device.detector.races)


def test_what_work_raises_is_raised_to_whoever_waits_for_its_stream(make_device):
    device = make_device()
    device.compute.run(lambda: 1 // 0)
    device.stream("other").synchronize()
    with pytest.raises(ZeroDivisionError):
        device.compute.synchronize()
    device.compute.synchronize()


def test_memory_is_counted_and_runs_out(make_device):
    device = make_device(memory_nbytes=10_000, fail_allocations={1})
    arena = device.allocate(6000)
    assert device.memory() == (4000, 10_000)
    with pytest.raises(DeviceOutOfMemory):
        device.allocate(1)  # the one that was to fail
    with pytest.raises(DeviceOutOfMemory, match="4000 are free"):
        device.allocate(4001)
    arena.free()
    assert device.allocate(10_000).nbytes == 10_000


def test_copies_share_a_link_of_that_speed(make_device):
    device = make_device(bandwidth=4096 / 0.01)
    arena = device.allocate(8192)
    streams = [device.stream(name) for name in "ab"]
    began = time.perf_counter()
    for i, stream in enumerate(streams):
        stream.copy_in(Region(arena, 4096 * i, 4096), filled(device, 4096, i))
    for stream in streams:
        stream.synchronize()
    assert time.perf_counter() - began >= 0.02  # never faster; how much slower is the machine's affair


def test_an_unknown_device_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown device 'tpu'; known: cpu, cuda, sim"):
        open_device("tpu")


def test_a_gpu_that_is_not_there_is_said_to_be_missing():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DeviceUnavailable, match="no CUDA device"):
        open_device("cuda")
