"""A device in host memory: real bytes, real stream semantics, and orderings that a GPU shows once in a million runs."""

from __future__ import annotations

import mmap
import random
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cache.device.device import DeviceOutOfMemory, Event, Region
from cache.device.races import Clock, RaceDetector, join


@dataclass(frozen=True, slots=True, kw_only=True)
class Adversary:
    """How the device misbehaves within what its contract allows. The delays are of each operation, at most.

    Which stream goes on when several could is drawn from `seed`; so is each delay. What the drawing decides depends on
    when the host's threads put operations in, so a seed is an ordering to provoke, not one to repeat.
    """

    seed: int = 0
    copy_delay_s: float = 0.0
    compute_delay_s: float = 0.0
    num_pieces: int = 1  # of a copy; other streams run between two of them
    bandwidth: float | None = None  # bytes/s of all copies together
    fail_allocations: Collection[int] = frozenset()  # the n-th to be asked for, from 0, finds no memory


class SimArena:
    """See `cache.device.device.Arena`."""

    def __init__(self, device: SimDevice, nbytes: int) -> None:
        self._device = device
        self.nbytes = nbytes
        self.memory = memoryview(mmap.mmap(-1, max(1, nbytes)))[:nbytes]

    def tensor(self) -> Any:
        import torch

        return torch.frombuffer(self.memory, dtype=torch.uint8)

    def free(self) -> None:
        self._device.give_back(self)


class SimEvent:
    """See `cache.device.device.Event`."""

    def __init__(self, device: SimDevice, stream: SimStream) -> None:
        self._device = device
        self._stream = stream
        self.clock: Clock = dict(stream.clock)
        self.is_done = False

    def synchronize(self) -> None:
        self._device.wait_for(self)
        error, self._stream.error = self._stream.error, None
        if error is not None:
            raise error


@dataclass(slots=True)
class _Operation:
    pieces: deque[Callable[[], object]]
    piece_s: float  # that the link is held for each
    waits_for: SimEvent | None = None
    makes: SimEvent | None = None
    not_before: float | None = None  # drawn when it is the first of its stream
    holds_link: bool = False


class SimStream:
    """See `cache.device.device.Stream`."""

    def __init__(self, device: SimDevice, index: int, name: str) -> None:
        self._device = device
        self.index = index
        self.name = name
        self.clock: Clock = {index: 0}  # of what is put here next
        self.queue: deque[_Operation] = deque()
        self.error: Exception | None = None  # of an operation, until somebody waits for one after it

    def copy_in(self, to: Region, source: memoryview) -> None:
        target = _memory(to)
        if len(source) != len(target):
            raise ValueError(f"a copy of {len(source)} bytes to {len(target)}")
        self._copy(target, source, to, is_write=True)

    def copy_out(self, to: memoryview, source: Region) -> None:
        origin = _memory(source)
        if len(to) != len(origin):
            raise ValueError(f"a copy of {len(origin)} bytes to {len(to)}")
        self._copy(to, origin, source, is_write=False)

    def run(self, work: Callable[[], object], reads: Sequence[Region] = (), writes: Sequence[Region] = ()) -> None:
        self._put(_Operation(deque([work]), 0.0), reads, writes, "computing")

    def record(self) -> SimEvent:
        with self._device.lock:
            event = SimEvent(self._device, self)
            self._device.put(self, _Operation(deque(), 0.0, makes=event))
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, SimEvent)
        with self._device.lock:
            join(self.clock, event.clock)
            self._device.put(self, _Operation(deque(), 0.0, waits_for=event))

    def synchronize(self) -> None:
        self.record().synchronize()

    def _copy(self, target: memoryview, origin: memoryview, region: Region, *, is_write: bool) -> None:
        """In pieces; whoever touches the host's side meanwhile is found out by its checksum."""
        adversary = self._device.adversary
        num = max(1, min(adversary.num_pieces, len(target)))
        bounds = [len(target) * i // num for i in range(num + 1)]
        host = origin if is_write else target
        before = [zlib.crc32(host[first:last]) for first, last in pairwise(bounds)]

        def piece(i: int) -> None:
            first, last = bounds[i], bounds[i + 1]
            if zlib.crc32(host[first:last]) != before[i]:
                self._device.detector.races.append(f"pinned memory changed before a copy on {self.name!r} had run")
            target[first:last] = origin[first:last]

        pieces: deque[Callable[[], object]] = deque(_Piece(piece, i) for i in range(num))
        held_s = len(target) / num / adversary.bandwidth if adversary.bandwidth else 0.0
        operation = _Operation(pieces, held_s)
        if is_write:
            self._put(operation, (), (region,), "a copy in")
        else:
            self._put(operation, (region,), (), "a copy out")

    def _put(self, operation: _Operation, reads: Sequence[Region], writes: Sequence[Region], what: str) -> None:
        with self._device.lock:
            join(self.clock, self._device.host_clock)
            self.clock[self.index] += 1
            for regions, is_write in ((reads, False), (writes, True)):
                for region in regions:
                    self._device.detector.access(
                        region,
                        is_write=is_write,
                        stream=self.index,
                        clock=self.clock,
                        what=f"{what} on {self.name!r} (operation {self.clock[self.index]})",
                    )
            self._device.put(self, operation)


@dataclass(slots=True)
class _Piece:
    run: Callable[[int], None]
    index: int

    def __call__(self) -> None:
        self.run(self.index)


class SimDevice:
    """See `cache.device.device.Device`. One thread runs the operations, a drawn one of the streams' first at a time.

    Only an event that a thread waited for orders what that same thread puts in afterwards; that two threads talked to
    each other does not, though it does on a GPU: the detector asks for the events.
    """

    name = "sim"
    tensors_on = "cpu"
    runs_kernels = False

    def __init__(self, memory_nbytes: int = 1024**3, adversary: Adversary | None = None) -> None:
        self.adversary = adversary or Adversary()
        self.detector = RaceDetector()
        self.lock = threading.RLock()
        self.num_allocations = 0
        self._changed = threading.Condition(self.lock)
        self._random = random.Random(self.adversary.seed)
        self._memory_nbytes = memory_nbytes
        self._arenas: list[SimArena] = []
        self._streams: list[SimStream] = []
        self._clocks = threading.local()
        self._link_free_at = 0.0
        self._is_closing = False
        self._compute = self.stream("compute")
        self._thread = threading.Thread(target=self._run, name="sim-device", daemon=True)
        self._thread.start()

    @property
    def compute(self) -> SimStream:
        return self._compute

    @property
    def host_clock(self) -> Clock:
        """What this thread knows to have happened."""
        clock: Clock | None = getattr(self._clocks, "clock", None)
        if clock is None:
            clock = self._clocks.clock = {}
        return clock

    def memory(self) -> tuple[int, int]:
        with self.lock:
            return self._memory_nbytes - sum(arena.nbytes for arena in self._arenas), self._memory_nbytes

    def allocate(self, nbytes: int) -> SimArena:
        with self.lock:
            number, self.num_allocations = self.num_allocations, self.num_allocations + 1
            free = self.memory()[0]
            if nbytes > free or number in self.adversary.fail_allocations:
                raise DeviceOutOfMemory(f"device memory: {nbytes} bytes asked for, {free} are free")
            self._arenas.append(SimArena(self, nbytes))
            return self._arenas[-1]

    def give_back(self, arena: SimArena) -> None:
        with self.lock:
            self._arenas.remove(arena)
            self.detector.forget(arena)

    def pinned(self, nbytes: int) -> memoryview:
        return memoryview(mmap.mmap(-1, nbytes))

    def stream(self, name: str) -> SimStream:
        with self.lock:
            self._streams.append(SimStream(self, len(self._streams), name))
            return self._streams[-1]

    def put(self, stream: SimStream, operation: _Operation) -> None:
        """Under the lock."""
        if self._is_closing:
            raise RuntimeError("the device is closed")
        stream.queue.append(operation)
        self._changed.notify_all()

    def wait_for(self, event: SimEvent) -> None:
        with self.lock:
            while not event.is_done:
                self._changed.wait()
            join(self.host_clock, event.clock)

    def close(self) -> None:
        """Run what is left, then end the thread."""
        with self.lock:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (chosen := self._choose()) is not None:
            stream, operation = chosen
            if operation.pieces:
                try:
                    operation.pieces.popleft()()
                except Exception as error:  # whoever waits must hear of it, whatever it is
                    operation.pieces.clear()
                    stream.error = error
            with self.lock:
                operation.holds_link = False
                if not operation.pieces:
                    stream.queue.popleft()
                    if operation.makes is not None:
                        operation.makes.is_done = True
                    self._changed.notify_all()

    def _choose(self) -> tuple[SimStream, _Operation] | None:
        """One of the operations that may go on now; None when all is done and nothing more is to come."""
        with self.lock:
            while True:
                now = time.perf_counter()
                able, soonest = [], None
                for stream in self._streams:
                    if not stream.queue:
                        continue
                    operation = stream.queue[0]
                    if operation.waits_for is not None and not operation.waits_for.is_done:
                        continue
                    if operation.not_before is None:
                        is_compute = stream is self._compute
                        limit = self.adversary.compute_delay_s if is_compute else self.adversary.copy_delay_s
                        operation.not_before = now + limit * self._random.random() if operation.pieces else now
                    ready_at = operation.not_before
                    if operation.piece_s and not operation.holds_link:
                        ready_at = max(ready_at, self._link_free_at)
                        if ready_at <= now:
                            operation.holds_link = True
                            ready_at = operation.not_before = self._link_free_at = now + operation.piece_s
                    if ready_at <= now:
                        able.append((stream, operation))
                    elif soonest is None or ready_at < soonest:
                        soonest = ready_at
                if able:
                    return self._random.choice(able)
                if soonest is None and self._is_closing and not any(stream.queue for stream in self._streams):
                    return None
                self._changed.wait(None if soonest is None else soonest - now)


def _memory(region: Region) -> memoryview:
    assert isinstance(region.arena, SimArena)
    if region.offset < 0 or region.offset + region.nbytes > region.arena.nbytes:
        raise ValueError(f"bytes {region.offset} to {region.offset + region.nbytes} of {region.arena.nbytes}")
    return region.arena.memory[region.offset : region.offset + region.nbytes]
