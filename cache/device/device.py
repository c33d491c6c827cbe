"""What a device is to the cache: memory, streams that run in order, events between them. Knows no experts, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol


class DeviceOutOfMemory(RuntimeError):
    """The device has no room for an allocation; what was there before is as it was."""


class DeviceUnavailable(RuntimeError):
    """There is no such device here; the message says what is missing."""


class Arena(Protocol):
    """One allocation on a device."""

    @property
    def nbytes(self) -> int: ...

    def tensor(self) -> Any:
        """All of it as a torch tensor, uint8 [nbytes], without a copy."""
        ...

    def free(self) -> None:
        """Give it back; nothing may use it any more."""
        ...


class Region(NamedTuple):
    """Bytes of an arena."""

    arena: Arena
    offset: int
    nbytes: int


class Event(Protocol):
    """A point in a stream: done when all that was put there before it has run."""

    def synchronize(self) -> None:
        """Wait, on this thread, until it is done; raises what the work before it raised, if that is not known yet."""
        ...


class Stream(Protocol):
    """Runs what is put into it in that order, some time after the call that put it there has returned."""

    def copy_in(self, to: Region, source: memoryview) -> None:
        """From pinned memory, which must stay as it is until the copy has run."""
        ...

    def copy_out(self, to: memoryview, source: Region) -> None:
        """To pinned memory, which nobody else may touch until the copy has run."""
        ...

    def run(self, work: Callable[[], object], reads: Sequence[Region] = (), writes: Sequence[Region] = ()) -> None:
        """Work of the device itself, and what it reads and writes of arenas."""
        ...

    def record(self) -> Event:
        """The point after all that was put here so far."""
        ...

    def wait(self, event: Event) -> None:
        """What is put here from now on runs after that event."""
        ...

    def synchronize(self) -> None:
        """Wait, on this thread, until all that was put here has run; raises what it raised."""
        ...


class Device(Protocol):
    """Its streams may be used from any thread, each stream by one at a time."""

    name: str
    tensors_on: str  # torch's name of where the tensors of its arenas are
    runs_kernels: bool  # a kernel that is called runs on `compute` by itself; else it has to be put there by `run`

    @property
    def compute(self) -> Stream:
        """What kernels are launched on."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all."""
        ...

    def allocate(self, nbytes: int) -> Arena:
        """Raises `DeviceOutOfMemory`."""
        ...

    def pinned(self, nbytes: int) -> memoryview:
        """Host memory for copies that run by themselves, page-aligned, zero; it is kept until the device is closed."""
        ...

    def stream(self, name: str) -> Stream:
        """A new one, independent of the others."""
        ...

    def close(self) -> None:
        """Wait for all streams and give everything back."""
        ...
