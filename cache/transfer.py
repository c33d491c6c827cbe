"""Moves records from the store into slots on a small pool of I/O threads. Knows no policy: first come, first served."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError, ExpertStore

OnDone = Callable[[ExpertReadError | None], None]


class TransferEngine:
    """`submit` returns at once; `on_done(error)` is called on an I/O thread when the record is in place and verified.

    A read that fails is tried once more before it is reported as failed.
    """

    def __init__(self, store: ExpertStore, num_threads: int) -> None:
        self._store = store
        self._jobs: queue.SimpleQueue[tuple[ExpertKey, memoryview, OnDone] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.num_reads = 0
        self.num_retries = 0
        self.num_errors = 0
        self.read_s = 0.0  # summed over threads
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-io-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: ExpertKey, buffer: memoryview, on_done: OnDone) -> None:
        self._jobs.put((key, buffer, on_done))

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            key, buffer, on_done = job
            on_done(self._read(key, buffer))

    def _read(self, key: ExpertKey, buffer: memoryview) -> ExpertReadError | None:
        started = time.perf_counter()
        failure: ExpertReadError | None = None
        retries = 0
        for attempt in range(2):
            retries = attempt
            try:
                self._store.read_into(key, buffer)
            except ExpertReadError as error:
                failure = error
            except Exception as error:  # a waiting lease must hear of it, whatever it is
                failure = ExpertReadError(key, f"{type(error).__name__}: {error}")
            else:
                failure = None
                break
        with self._lock:
            self.num_reads += 1
            self.num_retries += retries
            self.num_errors += failure is not None
            self.read_s += time.perf_counter() - started
        return failure
