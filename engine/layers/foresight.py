"""Who watches the routing as it happens: what foretells the coming layers' to the prefetcher, and what records it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cache.expert_key import ExpertKey
from cache.prefetcher import Prefetcher
from engine.batch import Batch
from kernels.backend import Routing


class RoutingObserver(Protocol):
    """Called by the decoder and its MoE layers, the layers with experts counted from 0; changes no result."""

    def step_begins(self, batch: Batch) -> None:
        """The tokens are known, and the routing of all layers where the model is pre-gated."""

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        """A layer is routed by x [T, H], its misses are on their way, its experts not computed yet."""

    def step_ends(self) -> None:
        """The last layer is computed."""


class Observers:
    """Several observers as one."""

    def __init__(self, observers: Sequence[RoutingObserver]) -> None:
        self._observers = observers

    def step_begins(self, batch: Batch) -> None:
        for observer in self._observers:
            observer.step_begins(batch)

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        for observer in self._observers:
            observer.layer_begins(index, x, routing, batch)

    def step_ends(self) -> None:
        for observer in self._observers:
            observer.step_ends()


class ExactForesight:
    """Of a pre-gated model: every layer's routing is known before the first one, so nothing is read in vain."""

    def __init__(self, prefetcher: Prefetcher, keys: Sequence[Sequence[ExpertKey]]) -> None:
        """`keys`: of each layer with experts, in the router's order."""
        self._prefetcher = prefetcher
        self._all_keys = keys
        self._wanted: list[list[ExpertKey]] = []  # of each layer, in this step
        self._still: list[frozenset[ExpertKey]] = []  # wanted from this layer on
        self._next = 0  # the first layer of which not all is here or on its way

    def step_begins(self, batch: Batch) -> None:
        assert batch.routings is not None
        self._wanted = [
            [keys[expert] for expert in routing.experts]
            for keys, routing in zip(self._all_keys, batch.routings, strict=True)
        ]
        still: frozenset[ExpertKey] = frozenset()
        self._still = [still]
        for wanted in reversed(self._wanted):
            still = still.union(wanted)
            self._still.append(still)
        self._still.reverse()
        self._next = 0
        self._prefetch(-1)

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        self._prefetcher.layer_begins(index)
        self._prefetcher.foretold(1, len(routing.experts), len(routing.experts))
        self._prefetch(index)

    def step_ends(self) -> None:
        self._prefetcher.step_ends()

    def _prefetch(self, index: int) -> None:
        """Top up what is on its way, nearest layer first; what this step still needs makes no room for it."""
        self._next = max(self._next, index + 1)
        keep = self._still[max(0, index)]
        while self._next < len(self._wanted):
            if not self._prefetcher.offer_certain(self._next - index, self._wanted[self._next], keep):
                return
            self._next += 1
