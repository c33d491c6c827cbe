"""How often each expert is asked for and found. A hit costs one addition in its entry; sums are made for who looks."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from cache.expert_key import ExpertKey
from cache.expert_table import RESIDENCY, ExpertTable
from cache.lease import Entry

HALF_LIFE_S = 10.0  # in which the weight of a recent use halves
_ROLL_S = 2.0  # uses of so long are aged together


class ExpertCounts:
    """The hits of an expert that has a slot are in its entry. Not thread-safe; `ExpertCache` calls under its lock."""

    def __init__(self, keys: Collection[ExpertKey], clock: Callable[[], float]) -> None:
        """`keys`: all experts there are; each layer has a row, as long as the longest layer."""
        self._layers = sorted({key.layer for key in keys})
        self._num_experts = 1 + max(key.expert for key in keys)
        self._start = {layer: row * self._num_experts for row, layer in enumerate(self._layers)}
        size = len(self._layers) * self._num_experts
        self._misses = array("Q", bytes(8 * size))
        self._past_hits = array("Q", bytes(8 * size))  # of entries that are gone
        self._recent = np.zeros(size)  # decayed queries up to the last aging
        self._aged = np.zeros(size, dtype=np.uint64)  # queries that are in `_recent`
        self._clock = clock
        self._aged_at = self._told_at = clock()

    def missed(self, key: ExpertKey) -> None:
        """It was asked for and not ready."""
        self._misses[self._start[key.layer] + key.expert] += 1

    def left(self, entry: Entry) -> None:
        """An expert loses its slot."""
        if entry.hits:
            self._past_hits[self._start[entry.key.layer] + entry.key.expert] += entry.hits

    def age(self, entries: Iterable[Entry]) -> None:
        """To be called often while experts are used, and when that ends. `entries`: of all that have a slot."""
        self._told_at = now = self._clock()
        if now - self._aged_at >= _ROLL_S:
            self._age(self._queries(self._hits(entries)))

    def table(self, entries: Collection[Entry], host: Iterable[ExpertKey]) -> ExpertTable:
        """A snapshot. `host`: the experts in the tier between."""
        hits = self._hits(entries)
        queries = self._queries(hits)
        self._age(queries)
        residency = bytearray(len(queries))
        ready = (entry.key for entry in entries if entry.ready)
        for tier, keys in (("host", host), ("top", ready)):
            number = RESIDENCY.index(tier)
            for layer, expert in keys:
                residency[self._start[layer] + expert] = number
        return ExpertTable(
            layers=self._layers,
            num_experts=self._num_experts,
            half_life_s=HALF_LIFE_S,
            queries=queries.astype("<u8").tobytes(),
            hits=hits.astype("<u8").tobytes(),
            recent=self._recent.astype("<f4").tobytes(),
            residency=bytes(residency),
        )

    def _hits(self, entries: Iterable[Entry]) -> NDArray[np.uint64]:
        hits = array("Q", self._past_hits)
        for entry in entries:
            if entry.hits:
                hits[self._start[entry.key.layer] + entry.key.expert] += entry.hits
        return np.frombuffer(hits, dtype=np.uint64)

    def _queries(self, hits: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return hits + np.frombuffer(self._misses, dtype=np.uint64)

    def _age(self, queries: NDArray[np.uint64]) -> None:
        now = self._clock()
        self._recent *= 0.5 ** ((now - self._aged_at) / HALF_LIFE_S)
        self._recent += (queries - self._aged) * 0.5 ** ((now - self._told_at) / HALF_LIFE_S)
        self._aged, self._aged_at, self._told_at = queries, now, now
