"""What evictions that knew the future would have hit, on windows of the observed routing. For the metrics alone.

A window is some steps of layer calls. Replayed with Belady's policy from the contents that the cache had when it began,
its first half is counted; the second is only foreseen, so that the end of the window does not flatter. What that costs
is done a little after each step, on the same thread, and windows are taken as often as that leaves time for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from heapq import heapify, heappop, heappush

from cache.expert_key import ExpertKey
from cache.stats import OracleStats

_STEPS = 128  # of a window
_MAX_QUERIES = 65_536  # of one with large steps
_SHARE = 0.003  # of the steps' time that is spent here
_MOST_S = 0.001  # that is spent at once, after idle steps
_NEVER = 1 << 62
_DONE = object()


class OracleSampler:
    """Told of layer calls under the cache's lock, and of steps by the thread that makes them."""

    def __init__(
        self, num_slots: int, resident: Collection[ExpertKey], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`resident`: the cache's own table."""
        self._num_slots = num_slots
        self._resident = resident
        self._clock = clock
        self._is_recording = False  # from the first step that is told of
        self._calls: list[tuple[Sequence[ExpertKey], int]] = []
        self._held: list[ExpertKey] = []  # when the window began
        self._num_steps = self._num_queries = 0
        self._work: Iterator[None] | None = None
        self._credit_s = 0.0
        self.stats = OracleStats()

    def saw(self, keys: Sequence[ExpertKey], num_hits: int) -> None:
        """A layer call asked for distinct experts; before any is loaded for it. `keys` must not change any more."""
        if not self._is_recording:
            return
        if not self._calls:
            self._held = list(self._resident)
        self._calls.append((keys, num_hits))
        self._num_queries += len(keys)

    def step_ended(self, seconds: float) -> None:
        """A step took so long."""
        if self._work is None:
            self._num_steps += bool(self._calls)
            if self._num_steps >= _STEPS or self._num_queries >= _MAX_QUERIES:
                self._is_recording = False
                self._work = self._replay(self._calls, self._held)
            else:
                self._is_recording = True
            return
        self._credit_s = min(self._credit_s + seconds * _SHARE, _MOST_S)
        while self._credit_s > 0.0 and self._work is not None:
            began = self._clock()
            if next(self._work, _DONE) is _DONE:
                self._work, self._calls, self._held = None, [], []
                self._num_steps = self._num_queries = 0
            self._credit_s -= self._clock() - began

    def _replay(self, calls: list[tuple[Sequence[ExpertKey], int]], held: list[ExpertKey]) -> Iterator[None]:
        """Yields now and then, to be gone on with when there is time."""
        coming: dict[ExpertKey, int] = {}  # the next call that uses it
        following: list[list[int]] = []  # of each call, backwards: the next ones that use its experts
        for i in range(len(calls) - 1, -1, -1):
            keys = calls[i][0]
            following.append([coming.get(key, _NEVER) for key in keys])
            coming.update(dict.fromkeys(keys, i))
            yield
        following.reverse()
        resident = set(held)
        farthest = [(-coming.get(key, _NEVER), key) for key in held]  # heap; what is used by now stays at its bottom
        heapify(farthest)
        queries = hits = oracle_hits = 0
        for i, (keys, num_hits) in enumerate(calls[: (len(calls) + 1) // 2]):
            num_found = sum(key in resident for key in keys)
            num_over = len(resident) + len(keys) - num_found - self._num_slots
            while num_over > 0 and farthest and farthest[0][0] < -i:
                resident.remove(heappop(farthest)[1])
                num_over -= 1
            resident.update(keys)
            for key, use in zip(keys, following[i], strict=True):
                heappush(farthest, (-use, key))
            while len(resident) > self._num_slots:  # in waves
                resident.remove(heappop(farthest)[1])
            oracle_hits += num_found
            hits += num_hits
            queries += len(keys)
            yield
        before = self.stats
        self.stats = OracleStats(
            queries=before.queries + queries,
            hits=before.hits + hits,
            oracle_hits=before.oracle_hits + oracle_hits,
        )
