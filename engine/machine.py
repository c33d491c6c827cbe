"""What this machine has and does, measured in a second or two: memory, its bandwidth, the disk's."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cache.host_memory import record_memory
from engine.free_memory import free_memory_nbytes
from kernels.backend import choose_backend
from kernels.cpu.native import NativeBackend

_READ_NBYTES = 256 * 1024**2
_NUM_READS = 5
_CHUNK_NBYTES = 1024**2
_NUM_THREADS = 4
_SAMPLE_NBYTES = 64 * _CHUNK_NBYTES
_DISK_S = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Bandwidths in bytes/s; None where they could not be measured."""

    num_threads: int
    free_nbytes: int
    memory_bandwidth: float | None
    disk_bandwidth: float | None
    disk_free_nbytes: int


def measure_machine(near: Path, samples: Sequence[Path], num_threads: int | None = None) -> Machine:
    """`near`: where packed experts go. `samples`: files; reads are timed on the largest one of that disk.

    If none of them will do, on one that is written there for the purpose.
    """
    num_threads = num_threads or len(os.sched_getaffinity(0))
    while not near.exists():
        near = near.parent
    disk = os.statvfs(near)
    here = [path for path in samples if path.stat().st_dev == near.stat().st_dev]
    sample = max(here, key=lambda path: path.stat().st_size, default=None)
    if sample is not None and sample.stat().st_size >= _SAMPLE_NBYTES:
        disk_bandwidth = _disk_bandwidth(sample)
    else:
        disk_bandwidth = _written_and_read(near)
    return Machine(
        num_threads=num_threads,
        free_nbytes=free_memory_nbytes(),
        memory_bandwidth=_memory_bandwidth(num_threads),
        disk_bandwidth=disk_bandwidth,
        disk_free_nbytes=disk.f_bavail * disk.f_frsize,
    )


def _memory_bandwidth(num_threads: int) -> float | None:
    backend = choose_backend("auto", num_threads)
    if not isinstance(backend, NativeBackend):
        return None
    memory = torch.ones(_READ_NBYTES, dtype=torch.uint8)  # not zeros: unwritten pages are all one page
    times = []
    for _ in range(_NUM_READS):
        began = time.perf_counter()
        backend.read(memory)
        times.append(time.perf_counter() - began)
    return _READ_NBYTES / statistics.median(times)


def _written_and_read(near: Path) -> float | None:
    try:
        with tempfile.NamedTemporaryFile(dir=near, prefix=".foregate-probe-") as file:
            for _ in range(_SAMPLE_NBYTES // _CHUNK_NBYTES):
                file.write(os.urandom(_CHUNK_NBYTES))
            file.flush()
            os.fsync(file.fileno())
            return _disk_bandwidth(Path(file.name))
    except OSError:
        return None


def _disk_bandwidth(path: Path) -> float | None:
    """Random reads past the page cache by several threads."""
    num_chunks = path.stat().st_size // _CHUNK_NBYTES
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    counts = [0] * _NUM_THREADS
    ends_at = time.perf_counter() + _DISK_S

    def read(thread: int) -> None:
        rng = random.Random(thread)
        buffer = record_memory(_CHUNK_NBYTES)
        while time.perf_counter() < ends_at:
            os.preadv(file, [buffer], rng.randrange(num_chunks) * _CHUNK_NBYTES)
            counts[thread] += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=read, args=(i,)) for i in range(_NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(file)
    return sum(counts) * _CHUNK_NBYTES / (time.perf_counter() - began)
