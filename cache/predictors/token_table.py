"""`token`: where the same token went the last times, which is known before the forward pass begins."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from cache.predictors.predictor import Scores, View

_MAX_TOKENS = 8192  # that are remembered, the least recently seen given up first
_MEMORY = 0.7  # of what a token did before, when it comes again


class TokenTablePredictor:
    """Scores are the decayed share of the token's past occurrences that used the expert, less what all tokens do."""

    name = "token"

    def __init__(self, num_layers: int, num_experts: int, num_active: int) -> None:
        self._shape = (num_layers, num_experts)
        self._usual = num_active / num_experts
        self._rates: OrderedDict[int, NDArray[np.float16]] = OrderedDict()
        self._unknown = np.full(self._shape, self._usual, dtype=np.float16)

    def scores(self, targets: slice, view: View) -> Scores | None:
        rates = [self._rates.get(token, self._unknown)[targets] for token in view.token_ids]
        return np.asarray(np.stack(rates, axis=1) - np.float32(self._usual), dtype=np.float32)

    def observe(self, index: int, view: View, chosen: NDArray[np.bool_]) -> None:
        for token, row in zip(view.token_ids, chosen, strict=True):
            rates = self._rates.get(token)
            if rates is None:
                rates = self._rates[token] = np.full(self._shape, self._usual, dtype=np.float16)
                if len(self._rates) > _MAX_TOKENS:
                    self._rates.popitem(last=False)
            elif index == 0:
                self._rates.move_to_end(token)
            rates[index] = np.float16(_MEMORY) * rates[index] + np.float16(1.0 - _MEMORY) * row

    def ended(self, request: int) -> None:
        """Nothing: tokens outlive requests."""
