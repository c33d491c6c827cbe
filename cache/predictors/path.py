"""`path`: what a small causal router, run by the engine before the first layer, makes of the tokens so far."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache.predictors.predictor import Scores, View

PATH = "path"  # in `View.gates`: [L, T, E], of all layers, in every view of the step


class PathPredictor:
    """Scores are the router's logits, which are log-odds already."""

    name = PATH

    def scores(self, targets: slice, view: View) -> Scores | None:
        logits = view.gates.get(PATH)
        return None if logits is None else logits[targets]

    def observe(self, index: int, view: View, chosen: NDArray[np.bool_]) -> None:
        """Nothing: the router was learned before."""

    def ended(self, request: int) -> None:
        """Nothing: the engine's router forgets the request."""
