"""`stale_gate` and `probe`: a linear map of an earlier layer's router input, made by the engine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.predictors.predictor import Scores, View


class GatePredictor:
    """Scores are logits less the k-th largest of their row, in standard deviations of the row."""

    def __init__(self, name: str, num_active: int) -> None:
        self.name = name
        self._num_active = num_active

    def scores(self, targets: slice, view: View) -> Scores | None:
        logits = view.gates.get(self.name)
        if logits is None:
            return None
        last = logits.shape[-1] - self._num_active
        threshold = np.partition(logits, last, axis=-1)[..., last : last + 1]
        spread = logits.std(axis=-1, keepdims=True) + 1e-6
        return np.asarray((logits - threshold) / spread, dtype=np.float32)

    def observe(self, index: int, view: View, chosen: NDArray[np.bool_]) -> None:
        """Nothing: the map was learned before, or is the model's own."""

    def ended(self, request: int) -> None:
        """Nothing."""
