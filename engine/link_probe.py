"""Times what brings experts: the packed file as the store reads it, and copies out of RAM."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertStore
from cache.slot_pool import SlotPool
from engine.calibration import LinkCost

_READS_AT_ONCE = (1, 2, 4, 8)
_NUM_READS = 12  # of which the median is taken
_TOGETHER = 4  # neighbours in one read, to tell latency from bytes
_SAMPLE_S = 0.3
_FEW = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedLink:
    """See the fields of `Calibration`."""

    disk: LinkCost
    host_bandwidth: float


def probe_link(store: ExpertStore, seed: int = 0) -> ProbedLink:
    """Reads random records for about a second; the store's own O_DIRECT, checksums included."""
    pool = SlotPool(max(_READS_AT_ONCE) * _TOGETHER, store.record_nbytes)
    buffers = [pool.buffer(slot) for slot in range(pool.num_slots)]
    rng = random.Random(seed)
    keys = store.header.keys

    def read(num: int) -> None:
        first = rng.randrange(max(1, len(keys) - num))
        run = keys[first : first + num]
        store.read_run(run, buffers[: len(run)])

    one_s = _median_s(lambda: read(1))
    together_s = _median_s(lambda: read(_TOGETHER))
    each_s = max((together_s - one_s) / (_TOGETHER - 1), one_s / 2)
    latency_s = max(0.0, one_s - each_s)
    rates = {1: store.record_nbytes / (one_s - latency_s)}
    for num_reads in _READS_AT_ONCE[1:]:
        seconds = num_reads / _reads_per_s(store, keys, buffers, num_reads)  # of each of them
        rates[num_reads] = num_reads * store.record_nbytes / max(seconds - latency_s, seconds / 2)
    source, target = buffers[:2]

    def copy() -> None:
        target[:] = source

    return ProbedLink(
        disk=LinkCost(latency_s=latency_s, rates=rates),
        host_bandwidth=store.record_nbytes / _median_s(copy),
    )


def read_slowdown(store: ExpertStore, compute: Callable[[], object]) -> float:
    """How much slower two threads read while this one computes, at least 1."""
    pool = SlotPool(2, store.record_nbytes)
    buffers = [pool.buffer(slot) for slot in range(2)]
    alone = _reads_per_s(store, store.header.keys, buffers, 2)
    return max(1.0, alone / _reads_per_s(store, store.header.keys, buffers, 2, compute))


def disk_bandwidth(store: ExpertStore) -> float:
    """Bytes/s of single records read at random by a few threads, now: a shared disk's speed changes by the minute."""
    pool = SlotPool(_FEW, store.record_nbytes)
    buffers = [pool.buffer(slot) for slot in range(_FEW)]
    return store.record_nbytes * _reads_per_s(store, store.header.keys, buffers, _FEW)


def _median_s(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_NUM_READS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _reads_per_s(
    store: ExpertStore,
    keys: tuple[ExpertKey, ...],
    buffers: list[memoryview],
    num_threads: int,
    compute: Callable[[], object] | None = None,
) -> float:
    """Of single records, by so many threads, for as long as `compute` takes if that is given."""
    counts = [0] * num_threads
    is_over = threading.Event()

    def read(thread: int) -> None:
        rng = random.Random(thread)
        while not is_over.is_set():
            store.read_into(rng.choice(keys), buffers[thread])
            counts[thread] += 1

    threads = [threading.Thread(target=read, args=(i,)) for i in range(num_threads)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    if compute is None:
        is_over.wait(_SAMPLE_S)
    else:
        compute()
    is_over.set()
    seconds = time.perf_counter() - began
    for thread in threads:
        thread.join()
    return sum(counts) / seconds
