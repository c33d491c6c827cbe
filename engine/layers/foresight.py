"""Who watches the routing as it happens, and what foretells the coming layers' to the prefetcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.certain_prefetch import CertainPrefetch
from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.layer_stream import LayerStream
from cache.predictors.fusion import Fusion, used_by_any
from cache.predictors.path import PATH
from cache.predictors.predictor import View
from cache.prefetcher import Prefetcher
from engine.batch import Batch
from kernels.backend import Routing

MAX_DISTANCE = 4  # layers ahead that are foretold
MAX_ROWS = 64  # of a step that are looked at: a prompt's chunk needs most experts anyway
KEPT = 0.5  # probability from which on an expert makes no room for a later layer's


class RoutingObserver(Protocol):
    """Called by the decoder and its MoE layers, the layers with experts counted from 0; changes no result."""

    def step_begins(self, batch: Batch) -> None:
        """The tokens are known, and the routing of all layers where the model is pre-gated."""

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        """A layer is routed by x [T, H], its misses are on their way, its experts not computed yet.

        `routing.ids` are in the CPU's memory; all else is where the model computes.
        """

    def step_ends(self) -> None:
        """The last layer is computed."""

    def request_ends(self, number: int) -> None:
        """Nothing more will come of a request."""


class Observers:
    """Several observers as one."""

    def __init__(self, observers: Sequence[RoutingObserver]) -> None:
        self._observers = list(observers)

    def add(self, observer: RoutingObserver) -> None:
        """Between steps: every step is seen whole."""
        self._observers = [*self._observers, observer]

    def remove(self, observer: RoutingObserver) -> None:
        """Between steps, or when one ends."""
        self._observers = [one for one in self._observers if one is not observer]

    def step_begins(self, batch: Batch) -> None:
        for observer in self._observers:
            observer.step_begins(batch)

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        for observer in self._observers:
            observer.layer_begins(index, x, routing, batch)

    def step_ends(self) -> None:
        for observer in self._observers:
            observer.step_ends()

    def request_ends(self, number: int) -> None:
        for observer in self._observers:
            observer.request_ends(number)


class ExactForesight:
    """Of a pre-gated model: every layer's routing is known before the first one, so nothing is read in vain.

    Only while compute waits for experts, and only if steps are no slower for it.
    """

    def __init__(self, prefetcher: Prefetcher, keys: Sequence[Sequence[ExpertKey]], *, always: bool = False) -> None:
        """`keys`: of each layer with experts, in the router's order. `always`: in slower steps, too."""
        self._plan = CertainPrefetch(prefetcher, keys, always=always)

    def step_begins(self, batch: Batch) -> None:
        assert batch.routings is not None
        num_decoded = len(batch.requests) if batch.phase == "decode" else 0
        self._plan.step_begins([routing.experts for routing in batch.routings], num_decoded)

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        self._plan.layer_begins(index)

    def step_ends(self) -> None:
        self._plan.step_ends()

    def request_ends(self, number: int) -> None:
        """Nothing: every step is known anew."""


class StreamedLayers:
    """Of any model: whole layers ahead in steps that need most experts of each, as a prompt's chunks do."""

    def __init__(self, cache: ExpertCache, keys: Sequence[Sequence[ExpertKey]]) -> None:
        """`keys`: of each layer with experts, in the router's order."""
        self._stream = LayerStream(cache, keys)

    def step_begins(self, batch: Batch) -> None:
        self._stream.step_begins(len(batch.requests))

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        self._stream.layer_begins(index, routing.experts)

    def step_ends(self) -> None:
        """Nothing: a chunk may be the last."""

    def request_ends(self, number: int) -> None:
        """Nothing: every step is looked at anew."""


class OracleForesight(ExactForesight):
    """Of any model, in a run that is repeated: what prediction could gain at best. For benchmarks."""

    def __init__(
        self, prefetcher: Prefetcher, keys: Sequence[Sequence[ExpertKey]], steps: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        """`steps`: the experts that each layer of each step was asked for the first time."""
        super().__init__(prefetcher, keys, always=True)
        self._steps = iter(steps)

    def step_begins(self, batch: Batch) -> None:
        self._plan.step_begins(next(self._steps))


class Gate(Protocol):
    """A linear map from a layer's router input to logits of the layers after it."""

    def __call__(self, index: int, x: Tensor) -> NDArray[np.float32] | None:
        """x [T, H] of the `index`-th layer with experts -> [D, T, E] of the D after it; None if it knows none."""
        ...


class TokenRouter(Protocol):
    """A causal router over token ids."""

    def __call__(self, requests: Sequence[int], token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The next tokens of some requests -> [L, T, E] of all layers with experts."""
        ...

    def ended(self, request: int) -> None: ...


class LearnedForesight:
    """Of a model whose layers route themselves: what its predictors expect, as far as the link has room."""

    def __init__(
        self,
        prefetcher: Prefetcher,
        keys: Sequence[Sequence[ExpertKey]],
        fusion: Fusion,
        gates: dict[str, Gate],
        path: TokenRouter | None = None,
    ) -> None:
        """`keys`: of each layer with experts, in the router's order. `path`: the `path` predictor's."""
        self._prefetcher = prefetcher
        self._keys = keys
        self._fusion = fusion
        self._gates = gates
        self._path = path
        self._rows = np.zeros(0, dtype=np.int64)  # of the step that are looked at
        self._scale = 1.0  # rows of the step for each of those
        self._view: View | None = None  # of this step; None while nothing is foretold
        self._num_decoded = 0  # rows of this step, if none is a prompt's

    def step_begins(self, batch: Batch) -> None:
        self._view = None
        self._prefetcher.step_begins()
        self._num_decoded = len(batch.requests) if batch.phase == "decode" else 0
        if not self._prefetcher.is_worth_it:
            return
        self._fusion.step_begins()
        num_rows = len(batch.requests)
        self._rows = np.linspace(0, num_rows - 1, min(num_rows, MAX_ROWS)).astype(np.int64)
        self._scale = num_rows / len(self._rows)
        tokens = batch.token_ids.numpy()[self._rows].tolist()
        requests = [batch.requests[row] for row in self._rows.tolist()]
        self._view = View(-1, requests, tokens, {} if self._path is None else {PATH: self._path(requests, tokens)})
        if self._is_of_use(-1):
            self._foretell(self._view)

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        self._prefetcher.layer_begins(index)
        if self._view is None:
            return
        keys = self._keys[index]
        self._prefetcher.cancel(keys[0].layer, {keys[expert] for expert in routing.experts})
        chosen = np.zeros((len(self._rows), len(keys)), dtype=np.bool_)
        chosen[np.arange(len(chosen))[:, None], routing.ids.numpy()[self._rows]] = True
        for distance, counts in self._fusion.observe(index, self._view, chosen).items():
            self._prefetcher.foretold(distance, *counts)
        if index + 1 < len(self._keys) and self._is_of_use(index):
            few = x if len(self._rows) == len(x) else x[torch.from_numpy(self._rows).to(x.device)]
            outputs = {name: gate(index, few) for name, gate in self._gates.items()}
            known = {name: output for name, output in outputs.items() if output is not None}
            self._foretell(View(index, self._view.requests, self._view.token_ids, self._view.gates | known))

    def step_ends(self) -> None:
        self._prefetcher.step_ends(self._num_decoded)

    def request_ends(self, number: int) -> None:
        self._fusion.ended(number)
        if self._path is not None:
            self._path.ended(number)

    def _is_of_use(self, index: int) -> bool:
        """Whether the link has room for something, or the fusion has to learn."""
        farthest = min(self._fusion.max_distance, len(self._keys) - 1 - index)
        return self._fusion.is_eager or self._prefetcher.num_admitted(max(index, 0), farthest) > 0

    def _foretell(self, view: View) -> None:
        """Offer what the next layers are likely to ask for, nearest first; the sooner ones' makes no room for later."""
        keep: set[ExpertKey] = set()
        likely = used_by_any(self._fusion.predict(view), self._scale).tolist()
        floor = self._prefetcher.floor
        for distance, of_layer in enumerate(likely, start=1):
            keys = self._keys[view.index + distance]
            candidates = [(key, p) for key, p in zip(keys, of_layer, strict=True) if p >= floor]
            self._prefetcher.offer(max(view.index, 0), distance, candidates, keep)
            keep.update(key for key, probability in candidates if probability >= KEPT)
