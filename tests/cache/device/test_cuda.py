"""`CudaDevice` over a stand-in for torch.cuda: not what CUDA does, but what is asked of it, and in which order."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cache.device.cuda as cuda
from cache.device.device import DeviceOutOfMemory, DeviceUnavailable, Region
from cache.device_pool import DevicePool


class _Log:
    """A torch whose `cuda` only writes down what is asked of it; tensors are the host's."""

    def __init__(self, register_status: int = 0) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.num_events = 0
        self.current = "default"
        self.registered: set[int] = set()
        log = self

        class Event:
            def __init__(self, *, blocking: bool) -> None:
                assert blocking  # who waits sleeps
                self.name = f"e{log.num_events}"
                log.num_events += 1

            def record(self, stream: Stream) -> None:
                log.calls.append(("record", self.name, stream.name))

            def synchronize(self) -> None:
                log.calls.append(("host waits for", self.name))

        class Stream:
            def __init__(self, device: object, name: str = "") -> None:
                self.name = name or f"s{len(log.calls)}"

            def wait_event(self, event: Event) -> None:
                log.calls.append(("wait", self.name, event.name))

            def synchronize(self) -> None:
                log.calls.append(("host waits for all", self.name))

        @contextlib.contextmanager
        def on_stream(stream: Stream) -> Iterator[None]:
            before, log.current = log.current, stream.name
            yield
            log.current = before

        def register(address: int, nbytes: int, flags: int) -> int:
            log.registered.add(address)
            return register_status

        self.uint8, self.OutOfMemoryError = torch.uint8, torch.OutOfMemoryError
        self.device = lambda kind, index: (kind, index)
        self.frombuffer = torch.frombuffer
        self.memory_left = 10**6
        self.cuda = SimpleNamespace(
            is_available=lambda: True,
            set_device=lambda device: None,
            current_stream=lambda device: Stream(device, "default"),
            Stream=lambda device: Stream(device, "copy"),
            Event=Event,
            stream=on_stream,
            mem_get_info=lambda device: (log.memory_left, 10**6),
            synchronize=lambda device: log.calls.append(("host waits for all", "all")),
            cudart=lambda: SimpleNamespace(
                cudaHostRegister=register, cudaHostUnregister=lambda address: log.registered.discard(address)
            ),
        )

    def empty(self, nbytes: int, *, dtype: Any, device: object) -> Any:
        if nbytes > self.memory_left:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _Logged(torch.zeros(nbytes, dtype=dtype), self)


class _Logged:
    """Device memory that says when it is written."""

    def __init__(self, tensor: torch.Tensor, log: _Log) -> None:
        self.tensor, self._log = tensor, log
        self.numel = tensor.numel

    def __getitem__(self, at: slice) -> _Logged:
        return _Logged(self.tensor[at], self._log)

    def copy_(self, source: torch.Tensor, *, non_blocking: bool) -> None:
        assert non_blocking
        self._log.calls.append(("copy", self._log.current, str(self.tensor.storage_offset())))
        self.tensor.copy_(source)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> _Log:
    log = _Log()
    monkeypatch.setitem(sys.modules, "torch", log)  # type: ignore[arg-type]
    return log


def test_a_slot_is_written_after_its_last_reader_and_read_after_its_copy_all_on_the_device(log: _Log):
    device = cuda.CudaDevice()
    pool = DevicePool(device, 2, 4096)
    slot = pool.take()
    assert slot is not None
    pool.handed_back([slot])  # a lease has ended
    copies = device.stream("copy 0")
    memory = device.pinned(4096)
    memory[:] = b"\x07" * 4096
    buffer = pool.buffer(slot)
    for event in buffer.after:
        copies.wait(event)
    copies.copy_in(buffer.region, memory)
    buffer.written(copies.record())
    pool.handed_out([slot])  # the next lease begins
    assert log.calls == [
        ("record", "e0", "default"),
        ("wait", "copy", "e0"),
        ("copy", "copy", str(slot * 4096)),
        ("record", "e1", "copy"),
        ("wait", "default", "e1"),
    ]
    assert bytes(pool.memory.tensor().tensor[slot * 4096 : (slot + 1) * 4096].numpy()) == b"\x07" * 4096
    pool.handed_out([slot])  # known to be there by now
    assert len(log.calls) == 5


def test_memory_that_is_pinned_is_given_back_after_the_last_copy(log: _Log):
    device = cuda.CudaDevice()
    device.pinned(4096)
    assert len(log.registered) == 1
    device.close()
    assert not log.registered
    assert log.calls == [("host waits for all", "all")]


def test_what_cannot_be_had_is_told_with_the_cure(monkeypatch: pytest.MonkeyPatch):
    log = _Log(register_status=2)
    monkeypatch.setitem(sys.modules, "torch", log)  # type: ignore[arg-type]
    device = cuda.CudaDevice()
    with pytest.raises(DeviceOutOfMemory, match=r"cannot be pinned \(cudaHostRegister: 2\); lower --host-memory"):
        device.pinned(4096)
    with pytest.raises(DeviceOutOfMemory, match="out of memory"):
        device.allocate(10**7)
    assert device.memory() == (10**6, 10**6)
    log.cuda.is_available = lambda: False
    with pytest.raises(DeviceUnavailable, match="no CUDA device"):
        cuda.CudaDevice()


def test_work_and_copies_out_are_on_their_own_stream(log: _Log):
    device = cuda.CudaDevice()
    where: list[str] = []
    device.compute.run(lambda: where.append(log.current))
    stream = device.stream("copy 1")
    stream.run(lambda: where.append(log.current))
    assert where == ["default", "copy"]
    arena = device.allocate(64)
    assert Region(arena, 0, 64).nbytes == arena.nbytes
    stream.synchronize()
    assert log.calls[-1] == ("host waits for all", "copy")
