"""Decides which foretold experts are worth reading ahead: only what the link can carry beside what is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.link_speed import WEIGHT

Candidate = tuple[ExpertKey, float]  # probability that the layer asks for it

_REVIEW = 64  # prefetches between two looks at what became of them
_FLOORS = (0.05, 0.95)  # of the probability that is asked for
_MAY_WASTE = 0.3  # share of the bytes: above it more probability is asked for
_DEADLINE = 1e-6  # of benefit, a layer: among equals the sooner needed first


class Prefetcher:
    """The spare-bandwidth law: bytes admitted for a layer <= bandwidth x compute time until it - bytes in flight.

    Bandwidth and compute time are measured. Of what fits, the most probable goes first. `floor` is the probability
    below which nothing is read; it rises while too much of what was read ahead goes unused, and falls otherwise.
    """

    def __init__(self, cache: ExpertCache, num_layers: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """`num_layers`: those with experts, which take turns."""
        self.floor = _FLOORS[0]
        self._cache = cache
        self._clock = clock
        self._compute_s = [0.0] * num_layers  # from one layer call to the next but for waiting, averaged
        self._turn = 0  # layer calls so far: the common time of all deadlines
        self._since: tuple[int, float, float] | None = None  # layer, time and stall at the last call
        self._reviewed = (0, 0)  # useful or late, wasted

    def layer_begins(self, index: int) -> None:
        """The layer call of the `index`-th layer with experts begins."""
        now, stall = self._clock(), self._cache.stall_s
        self._turn += 1
        if self._since is not None:
            last, then, stalled = self._since
            sample = max(0.0, now - then - (stall - stalled))
            average = self._compute_s[last]
            self._compute_s[last] = average + (sample - average) * (WEIGHT if average else 1.0)
        self._since = (index, now, stall)

    def step_ends(self) -> None:
        """What comes until the next layer call is not this layer's compute."""
        self._since = None
        self._review()

    def foretold(self, distance: int, num_predicted: int, num_routed: int) -> None:
        """Of a layer's routed experts so many had been predicted that many layers ahead."""
        self._cache.foretold(distance, num_predicted, num_routed)

    def window_s(self, index: int, distance: int) -> float:
        """Compute time from layer `index` to the one `distance` layers on."""
        num_layers = len(self._compute_s)
        return sum(self._compute_s[(index + i) % num_layers] for i in range(distance))

    def offer(
        self, index: int, distance: int, candidates: Sequence[Candidate], keep: Collection[ExpertKey] = frozenset()
    ) -> int:
        """Read ahead what of the candidates is worth it, for the layer `distance` after layer `index`; -> how many.

        Nothing in `keep` is evicted for it.
        """
        transfer = self._cache.transfer
        nbytes = self._cache.record_nbytes
        if transfer.bandwidth is None:
            room: float = (
                transfer.depth * nbytes - transfer.in_flight_nbytes
            )  # not measured yet: as many as are read at once
        else:
            room = transfer.bandwidth * self.window_s(index, distance) - transfer.in_flight_nbytes
        num = int(room // nbytes)
        if num <= 0:
            return 0
        likely = [candidate for candidate in candidates if candidate[1] >= self.floor]
        if not likely:
            return 0
        missing = set(self._cache.missing([key for key, _ in likely]))
        best = sorted((c for c in likely if c[0] in missing), key=lambda c: -c[1])[:num]
        return self._issue(best, distance, keep)

    def offer_certain(
        self, distance: int, keys: Sequence[ExpertKey], keep: Collection[ExpertKey] = frozenset()
    ) -> bool:
        """Read ahead what a layer is sure to ask for, as far as there are slots and the queue is short; -> if all was.

        Certain bytes have to come anyway; a short queue lets what turns out to be waited for overtake them.
        """
        transfer = self._cache.transfer
        missing = self._cache.missing(keys)
        num = min(len(missing), 2 * transfer.depth - transfer.in_flight_nbytes // self._cache.record_nbytes)
        if num > 0:
            num = self._issue([(key, 1.0) for key in missing[:num]], distance, keep)
        return len(missing) <= max(0, num)

    def _issue(self, chosen: Sequence[Candidate], distance: int, keep: Collection[ExpertKey]) -> int:
        deadline = (self._turn + distance) * _DEADLINE
        return self._cache.prefetch([(key, p - deadline) for key, p in chosen], distance, keep)

    def _review(self) -> None:
        prefetch = self._cache.stats().prefetch.values()
        used, wasted = sum(p.useful + p.late for p in prefetch), sum(p.wasted for p in prefetch)
        now_used, now_wasted = used - self._reviewed[0], wasted - self._reviewed[1]
        if now_used + now_wasted < _REVIEW:
            return
        self._reviewed = (used, wasted)
        low, high = _FLOORS
        if now_wasted > _MAY_WASTE * (now_used + now_wasted):
            self.floor = min(high, self.floor * 1.25)
        else:
            self.floor = max(low, self.floor / 1.1)
