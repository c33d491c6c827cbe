"""Decides which foretold experts are worth reading ahead: only what the link can carry beside what is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.link_speed import WEIGHT
from cache.trials import Trials

Candidate = tuple[ExpertKey, float]  # probability that the layer asks for it

_WAITED = 0.02  # share of the time that compute has to wait before anything is foretold
_STALL_WEIGHT = 0.1  # of the last step in that share
_REVIEW = 32  # steps between two looks at what became of prefetches
_FLOORS = (0.3, 0.95)  # of the probability that is asked for
_FIRST_FLOOR = 0.5
_MAY_WASTE = 0.3  # share of the bytes: above it more probability is asked for
_DEADLINE, _TURNS = 1e-7, 100_000  # of benefit, a layer: among equals the sooner needed first; turns wrap around


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
        self._reviewed = (0, 0)  # used, wasted at the last review
        self._num_steps = 0
        self._stall_share = 0.0
        self._trials = Trials()
        self._began = (clock(), cache.stall_s)  # of this step: time and stall

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

    def step_begins(self) -> None:
        """What came since the last layer call was not its compute."""
        self._since = None
        self._began = (self._clock(), self._cache.stall_s)

    def step_ends(self, num_rows: int = 0) -> None:
        """The last layer is computed. `num_rows`: of a step of decode."""
        began, stalled = self._began
        seconds = self._clock() - began
        share = (self._cache.stall_s - stalled) / max(seconds, 1e-9)
        self._stall_share += (share - self._stall_share) * _STALL_WEIGHT
        if num_rows and self._stall_share > _WAITED:
            self._trials.add(seconds / num_rows)
        self._review()

    @property
    def is_worth_it(self) -> bool:
        """Whether to foretell in this step: compute has waited, and steps are faster for it or that is being tried."""
        return self._stall_share > _WAITED and self._trials.is_on

    def will_use(self, keys: Sequence[Sequence[ExpertKey]]) -> None:
        """A step begins that is sure to use these, of each of its layers."""
        self._cache.will_use(keys)

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

    def num_admitted(self, index: int, distance: int) -> int:
        """Records that the link has room for now, to be there `distance` layers after layer `index`."""
        transfer = self._cache.transfer
        nbytes = self._cache.record_nbytes
        bandwidth = transfer.bandwidth
        if bandwidth is None:
            admitted = float(transfer.depth * nbytes)  # not measured yet: as many as are read at once
        else:
            admitted = bandwidth * self.window_s(index, distance)
        return max(0, int((admitted - transfer.in_flight_nbytes) // nbytes))

    def offer(
        self, index: int, distance: int, candidates: Sequence[Candidate], keep: Collection[ExpertKey] = frozenset()
    ) -> int:
        """Read ahead what of the candidates is worth it, for the layer `distance` after layer `index`; -> how many.

        Nothing in `keep` is evicted for it.
        """
        num = self.num_admitted(index, distance)
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
        """Read ahead what a layer is sure to ask for, as far as there are slots; -> if all was.

        Certain bytes have to come anyway, so that the link is to have work until the next call: the next layer's are
        queued whatever is on its way already, later ones' only while the queue is short, since slots that wait for
        records are of no use.
        """
        transfer = self._cache.transfer
        nbytes = self._cache.record_nbytes
        missing = self._cache.missing(keys)
        num = len(missing)
        if distance > 1:
            carried = (transfer.bandwidth or 0.0) * sum(self._compute_s) / len(self._compute_s)  # in a layer's time
            queue = max(2 * transfer.depth, int(2.0 * carried / nbytes))
            num = min(num, queue - transfer.in_flight_nbytes // nbytes)
        if num > 0:
            num = self._issue([(key, 1.0) for key in missing[:num]], distance, keep)
        return len(missing) <= max(0, num)

    def _issue(self, chosen: Sequence[Candidate], distance: int, keep: Collection[ExpertKey]) -> int:
        deadline = (self._turn + distance) % _TURNS * _DEADLINE
        return self._cache.prefetch([(key, p - deadline) for key, p in chosen], distance, keep)

    def _review(self) -> None:
        """Now and then, raise or lower the floor by what became of prefetches."""
        self._num_steps += 1
        if self._num_steps % _REVIEW:
            return
        counts = self._cache.stats().prefetch.values()
        used, wasted = sum(c.useful + c.late for c in counts), sum(c.wasted for c in counts)
        now_used, now_wasted = used - self._reviewed[0], wasted - self._reviewed[1]
        if now_used + now_wasted == 0:
            return
        self._reviewed = (used, wasted)
        low, high = _FLOORS
        if now_wasted > _MAY_WASTE * (now_used + now_wasted):
            self.floor = min(high, self.floor * 1.5)
        else:
            self.floor = max(low, self.floor / 1.2)
