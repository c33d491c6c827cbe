"""Streams whole layers where most of a layer's experts are needed: the next layer comes while this one is computed."""

from __future__ import annotations

from collections.abc import Sequence

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey

_MOST = 0.85  # share of a layer's experts from which on the next one's are brought; below, too much is read in vain
_SOONER = 1e-4  # of benefit, a record: they come in the order that they lie in


class LayerStream:
    """Told when a step and each of its layers come; the layers with experts are counted from 0.

    A prompt's chunk needs most experts of every layer, so that nobody has to foretell which. While one layer is
    computed from its slots the next one's records take those that the layers before have left: nothing goes that the
    step still needs. Whatever is asked for overtakes them, and when a layer is routed, what it does not need and has
    not begun to come is given up.
    """

    def __init__(self, cache: ExpertCache, keys: Sequence[Sequence[ExpertKey]]) -> None:
        """`keys`: of each layer with experts, in the router's order."""
        self._cache = cache
        self._keys = keys
        self._num_rows = 0  # of this step
        self._enough_rows: int | None = None  # the fewest of a step that needed most experts of its layers
        # when a layer is brought: those of the layers from the one that is computed then, and of the first all but the
        # last, which has its turn when the others have passed
        self._still_needed = [
            frozenset(key for of_layer in (keys[index - 1 :] if index else keys[:-1]) for key in of_layer)
            for index in range(len(keys))
        ]

    def step_begins(self, num_rows: int) -> None:
        """A step of so many rows: if that is enough, its first layer is begun before it is routed."""
        self._num_rows = num_rows
        if self._enough_rows is not None and num_rows >= self._enough_rows:
            self._bring(0)

    def layer_begins(self, index: int, experts: Sequence[int]) -> None:
        """The misses of that layer, which is routed to these experts, are on their way; its compute begins."""
        keys = self._keys[index]
        self._cache.cancel_prefetches(keys[0].layer, {keys[expert] for expert in experts})
        if len(experts) < _MOST * len(keys):
            if self._enough_rows is not None and self._num_rows >= self._enough_rows:
                self._enough_rows = self._num_rows + 1
            return
        if self._enough_rows is None or self._num_rows < self._enough_rows:
            self._enough_rows = self._num_rows
        if index + 1 < len(self._keys):
            self._bring(index + 1)

    def _bring(self, index: int) -> None:
        """Begin to read all of a layer that is not here, into free slots and those of layers that have passed."""
        missing = self._cache.missing(self._keys[index])
        wanted = [(key, 1.0 - _SOONER * i) for i, key in enumerate(missing)]
        self._cache.prefetch(wanted, 1, self._still_needed[index])
