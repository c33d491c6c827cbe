"""A predictor that is only its recall and precision: knows the routing to come, and gets so much of it wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache.expert_key import ExpertKey
from cache.prefetcher import Candidate, Prefetcher

MAX_DISTANCE = 4  # layers ahead, as engine.layers.foresight foretells
_KEPT = 0.5  # probability from which on an expert makes no room for a later layer's
_LOSS = 0.04  # of recall and precision for each further layer ahead (published: 3.5 to 4 points)
MAX_RECALL_LOSS = _LOSS * (MAX_DISTANCE - 1)


class ForetellingPrefetch:
    """Offers the real prefetcher what such a predictor would, layer by layer as `LearnedForesight` does.

    An expert that is found four layers ahead is found nearer too; what is said in error is said at every distance.
    """

    def __init__(
        self,
        prefetcher: Prefetcher,
        keys: Sequence[Sequence[ExpertKey]],
        *,
        recall: float,
        precision: float,
        seed: int = 0,
    ) -> None:
        """`recall`: share of a layer's experts that are foretold one layer ahead; `precision`: of what is foretold."""
        self._prefetcher = prefetcher
        self._keys = keys
        self._recall = recall
        self._precision = precision
        self._rng = np.random.default_rng(seed)
        self._experts: Sequence[Sequence[int]] = ()
        self._luck: list[NDArray[np.float64]] = []  # of each used expert of each layer
        self._errors: list[list[int]] = []  # experts of each layer that are not used, in random order
        self.is_on = False

    def step_begins(self, experts: Sequence[Sequence[int]]) -> None:
        """A step whose layers will be asked for these experts."""
        self._prefetcher.step_begins()
        self.is_on = self._prefetcher.is_worth_it
        if self.is_on:
            self._experts = experts
            self._luck = [self._rng.random(len(used)) for used in experts]
            self._errors = [
                self._rng.permutation(np.setdiff1d(np.arange(len(keys)), used)).tolist()
                for keys, used in zip(self._keys, experts, strict=True)
            ]
            self._foretell(-1)

    def layer_begins(self, index: int) -> None:
        """The misses of that layer are on their way, its experts not computed yet."""
        self._prefetcher.layer_begins(index)
        if self.is_on:
            keys = self._keys[index]
            self._prefetcher.cancel(keys[0].layer, {keys[expert] for expert in self._experts[index]})
            self._foretell(index)

    def step_ends(self, num_rows: int) -> None:
        """The last layer is computed. `num_rows`: of a step of decode."""
        self._prefetcher.step_ends(num_rows)

    def _foretell(self, index: int) -> None:
        keep: set[ExpertKey] = set()
        for distance in range(1, min(MAX_DISTANCE, len(self._keys) - 1 - index) + 1):
            candidates = self._candidates(index + distance, distance)
            self._prefetcher.offer(max(index, 0), distance, candidates, keep)
            keep.update(key for key, probability in candidates if probability >= _KEPT)

    def _candidates(self, layer: int, distance: int) -> list[Candidate]:
        loss = _LOSS * (distance - 1)
        recall, precision = self._recall - loss, max(0.01, self._precision - loss)
        used = self._experts[layer]
        right = [expert for expert, luck in zip(used, self._luck[layer].tolist(), strict=True) if luck < recall]
        num_wrong = round(len(right) * (1.0 - precision) / precision)
        wrong = self._errors[layer][:num_wrong]
        return [(self._keys[layer][expert], precision) for expert in [*right, *wrong]]
