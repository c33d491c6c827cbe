"""A GPU through torch.cuda. Written against torch's documentation: it has not met a GPU yet (docs/gpu.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cache.device.device import DeviceOutOfMemory, DeviceUnavailable, Event, Region
from cache.host_memory import record_memory


class CudaArena:
    """See `cache.device.device.Arena`."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.nbytes: int = tensor.numel()

    def tensor(self) -> Any:
        return self._tensor

    def free(self) -> None:
        self._tensor = None


class CudaEvent:
    """See `cache.device.device.Event`."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def synchronize(self) -> None:
        self.event.synchronize()


class CudaStream:
    """See `cache.device.device.Stream`."""

    def __init__(self, torch: Any, stream: Any) -> None:
        self._torch = torch
        self._stream = stream

    def copy_in(self, to: Region, source: memoryview) -> None:
        with self._torch.cuda.stream(self._stream):
            _part(to).copy_(self._torch.frombuffer(source, dtype=self._torch.uint8), non_blocking=True)

    def copy_out(self, to: memoryview, source: Region) -> None:
        with self._torch.cuda.stream(self._stream):
            self._torch.frombuffer(to, dtype=self._torch.uint8).copy_(_part(source), non_blocking=True)

    def run(self, work: Callable[[], object], reads: Sequence[Region] = (), writes: Sequence[Region] = ()) -> None:
        """`reads` and `writes` are for devices that look for races."""
        with self._torch.cuda.stream(self._stream):
            work()

    def record(self) -> CudaEvent:
        event = self._torch.cuda.Event(blocking=True)  # a thread that waits for one sleeps
        event.record(self._stream)
        return CudaEvent(event)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.event)

    def synchronize(self) -> None:
        self._stream.synchronize()


class CudaDevice:
    """See `cache.device.device.Device`. `compute` is the stream that torch launches on."""

    name = "cuda"
    tensors_on = "cuda"
    runs_kernels = True

    def __init__(self, index: int = 0) -> None:
        import torch

        if not torch.cuda.is_available():
            raise DeviceUnavailable(
                "no CUDA device: torch finds no GPU or no driver; `foregate doctor` says what is missing"
            )
        self._torch: Any = torch
        self._device = torch.device("cuda", index)
        torch.cuda.set_device(self._device)
        self._pinned: list[tuple[memoryview, int]] = []
        self._compute = CudaStream(self._torch, torch.cuda.current_stream(self._device))

    @property
    def compute(self) -> CudaStream:
        return self._compute

    def memory(self) -> tuple[int, int]:
        free, total = self._torch.cuda.mem_get_info(self._device)
        return int(free), int(total)

    def allocate(self, nbytes: int) -> CudaArena:
        try:
            return CudaArena(self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device))
        except self._torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory(str(error)) from error

    def pinned(self, nbytes: int) -> memoryview:
        """Registered rather than allocated by torch, whose allocator rounds up to a power of two."""
        memory = record_memory(nbytes)
        address = self._torch.frombuffer(memory, dtype=self._torch.uint8).data_ptr()
        status = self._torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
        if int(status) != 0:
            raise DeviceOutOfMemory(
                f"{nbytes} bytes of host memory cannot be pinned (cudaHostRegister: {int(status)}); lower "
                "--host-memory or raise the limit on locked memory (ulimit -l)"
            )
        self._pinned.append((memory, address))
        return memory

    def stream(self, name: str) -> CudaStream:
        return CudaStream(self._torch, self._torch.cuda.Stream(self._device))

    def close(self) -> None:
        self._torch.cuda.synchronize(self._device)
        for _, address in self._pinned:
            self._torch.cuda.cudart().cudaHostUnregister(address)
        self._pinned.clear()


def _part(region: Region) -> Any:
    return region.arena.tensor()[region.offset : region.offset + region.nbytes]
