"""Decides which foretold experts are worth reading ahead: only what the link can carry beside what is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.link_speed import WEIGHT

Candidate = tuple[ExpertKey, float]  # probability that the layer asks for it

_WAITED = 0.02  # share of the time that compute has to wait before anything is foretold
_STALL_WEIGHT = 0.1  # of the last step in that share
_REVIEW = 32  # steps between two looks at what became of prefetches
_SLEEP = 256  # steps without, where they did not pay
_FLOORS = (0.3, 0.95)  # of the probability that is asked for
_FIRST_FLOOR = 0.5
_MAY_WASTE = 0.3  # share of the bytes: above it more probability is asked for
_DEADLINE = 1e-6  # of benefit, a layer: among equals the sooner needed first


class Prefetcher:
    """The spare-bandwidth law: bytes admitted for a layer <= bandwidth x compute time until it - bytes in flight.

    Bandwidth and compute time are measured. Of what fits, the most probable goes first. `floor` is the probability
    below which nothing is read; it rises while too much of what was read ahead goes unused, and falls otherwise.
    """

    def __init__(self, cache: ExpertCache, num_layers: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """`num_layers`: those with experts, which take turns."""
        self.floor = _FIRST_FLOOR
        self._cache = cache
        self._clock = clock
        self._compute_s = [0.0] * num_layers  # from one layer call to the next but for waiting, averaged
        self._turn = 0  # layer calls so far: the common time of all deadlines
        self._since: tuple[int, float, float] | None = None  # layer, time and stall at the last call
        self._reviewed = (0, 0, 0)  # useful, late, wasted at the last review
        self._num_steps = self._asleep_for = 0
        self._cost_s = self._stall_share = 0.0
        self._last_end: tuple[float, float] | None = None  # time and stall

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
        now, stall = self._clock(), self._cache.stall_s
        if self._last_end is not None:
            then, stalled = self._last_end
            share = (stall - stalled) / max(now - then, 1e-9)
            self._stall_share += (share - self._stall_share) * _STALL_WEIGHT
        self._last_end = (now, stall)
        self._asleep_for = max(0, self._asleep_for - 1)
        self._review()

    @property
    def is_worth_it(self) -> bool:
        """Whether to foretell in this step: compute has waited, and foretelling has not cost more than it saved."""
        return self._asleep_for == 0 and self._stall_share > _WAITED

    @contextmanager
    def counting_cost(self) -> Iterator[None]:
        """Around what foretelling takes."""
        started = self._clock()
        yield
        self._cost_s += self._clock() - started

    def cancel(self, layer: int, but: Collection[ExpertKey]) -> None:
        """What is on its way to a layer that is routed now, and not asked for, is not needed."""
        self._cache.cancel_prefetches(layer, but)

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
            admitted = float(transfer.depth * nbytes)  # not measured yet: as many as are read at once
        else:
            admitted = transfer.bandwidth * self.window_s(index, distance)
        num = int((admitted - transfer.in_flight_nbytes) // nbytes)
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
        """After so many steps of foretelling: raise or lower the floor, and sleep if it does not pay."""
        if not self.is_worth_it:
            return
        self._num_steps += 1
        if self._num_steps % _REVIEW:
            return
        counts = self._cache.stats().prefetch.values()
        useful, late, wasted = (sum(getattr(c, name) for c in counts) for name in ("useful", "late", "wasted"))
        before = self._reviewed
        self._reviewed = (useful, late, wasted)
        useful, late, wasted = useful - before[0], late - before[1], wasted - before[2]
        low, high = _FLOORS
        if wasted > _MAY_WASTE * (useful + late + wasted):
            self.floor = min(high, self.floor * 1.5)
        else:
            self.floor = max(low, self.floor / 1.2)
        record_s = self._cache.record_nbytes / (self._cache.transfer.bandwidth or float("inf"))
        saved_s = (useful + late / 2 - wasted / 2) * record_s  # what was not waited for, less what stood in the way
        if saved_s < self._cost_s:
            self._asleep_for = _SLEEP
        self._cost_s = 0.0
