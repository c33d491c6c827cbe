"""`history`: how often the request itself has used an expert of late."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.predictors.predictor import Scores, View


class HistoryPredictor:
    """Scores are log odds of a decayed share of the request's tokens, against the share of all requests' at first."""

    name = "history"

    def __init__(self, num_layers: int, num_experts: int, num_active: int, decay: float) -> None:
        self._decay = decay
        self._shares = np.full((num_layers, num_experts), num_active / num_experts, dtype=np.float32)
        self._of_request: dict[int, NDArray[np.float32]] = {}

    def scores(self, targets: slice, view: View) -> Scores | None:
        rates = np.stack([self._of_request.get(r, self._shares)[targets] for r in view.requests], axis=1)
        rates = np.clip(rates, 0.003, 0.997)
        return np.asarray(np.log(rates / (1.0 - rates)), dtype=np.float32)

    def observe(self, index: int, view: View, chosen: NDArray[np.bool_]) -> None:
        decay = self._decay
        self._shares[index] += 0.02 * (chosen.mean(axis=0) - self._shares[index])
        for request, row in zip(view.requests, chosen, strict=True):
            rates = self._of_request.get(request)
            if rates is None:
                rates = self._of_request[request] = self._shares.copy()
            rates[index] = decay * rates[index] + (1.0 - decay) * row

    def ended(self, request: int) -> None:
        self._of_request.pop(request, None)
