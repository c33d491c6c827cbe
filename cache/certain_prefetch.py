"""Reads ahead where a step's routing is known before its first layer: exactly what is used, the nearest layer first."""

from __future__ import annotations

from collections.abc import Sequence

from cache.expert_key import ExpertKey
from cache.prefetcher import Prefetcher


class CertainPrefetch:
    """Told when a step, each of its layers and its end come; the layers with experts are counted from 0."""

    def __init__(self, prefetcher: Prefetcher, keys: Sequence[Sequence[ExpertKey]], *, always: bool = False) -> None:
        """`keys`: of each layer with experts, in the router's order. `always`: in steps that it makes slower, too."""
        self._prefetcher = prefetcher
        self._always = always
        self._is_on = False  # in this step
        self._num_decoded = 0  # rows of this step, if none is a prompt's
        self._all_keys = keys
        self._wanted: list[list[ExpertKey]] = []  # of each layer, in this step
        self._still: set[ExpertKey] = set()  # wanted by layers that have not ended
        self._next = 0  # the first layer of which not all is here or on its way

    def step_begins(self, experts: Sequence[Sequence[int]], num_decoded: int = 0) -> None:
        """A step whose layers will be asked for these experts. `num_decoded`: its rows, if none is a prompt's."""
        self._prefetcher.step_begins()
        self._num_decoded = num_decoded
        self._wanted = [
            [keys[expert] for expert in of_layer] for keys, of_layer in zip(self._all_keys, experts, strict=True)
        ]
        self._prefetcher.will_use(self._wanted)
        self._is_on = self._always or self._prefetcher.is_worth_it
        if not self._is_on:
            return
        self._still = set().union(*self._wanted)
        self._next = 0
        self._prefetch(-1)

    def layer_begins(self, index: int) -> None:
        """The misses of that layer are on their way, its experts not computed yet."""
        self._prefetcher.layer_begins(index)
        if not self._is_on:
            return
        if index:
            self._still.difference_update(self._wanted[index - 1])
        self._prefetcher.foretold(1, len(self._wanted[index]), len(self._wanted[index]))
        self._prefetch(index)

    def step_ends(self) -> None:
        """The last layer is computed."""
        self._prefetcher.step_ends(self._num_decoded)

    def _prefetch(self, index: int) -> None:
        """Top up what is on its way, nearest layer first; what this step still needs makes no room for it."""
        self._next = max(self._next, index + 1)
        while self._next < len(self._wanted):
            if not self._prefetcher.offer_certain(self._next - index, self._wanted[self._next], self._still):
                return
            self._next += 1
