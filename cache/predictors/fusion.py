"""One probability out of what several predictors say: logistic regression that goes on learning while serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.predictors.predictor import Predictor, View

Probabilities = NDArray[np.float32]  # [D, T, E], of the D layers after a view's

_STEP = 0.3  # of Adagrad
_EAGER = 64  # steps in which all is learned from; then one in _SELDOM
_SELDOM = 4


@dataclass(slots=True)
class _Forecast:
    view: View
    features: NDArray[np.float32]  # [D, F + 1, T, E]; zeros of a predictor that had nothing to say; ones
    probabilities: Probabilities


class Fusion:
    """Predicts, and is told what came of it. Calibrated: of what has probability p a share of p comes true."""

    def __init__(self, predictors: Sequence[Predictor], shape: tuple[int, int, int], max_distance: int) -> None:
        """`shape`: layers with experts, experts of each, active ones."""
        self.max_distance = max_distance
        self._predictors = predictors
        self._num_layers, self._num_experts, self._num_active = shape
        usual = self._num_active / self._num_experts
        # before the first layer there are no gates, so what the others say weighs more: two sets of weights
        self._weights = np.full((2, max_distance, len(predictors) + 1), 0.5, dtype=np.float32)
        self._weights[..., -1] = np.log(usual / (1.0 - usual))
        self._squares = np.full_like(self._weights, 1e-3)
        self._forecasts: list[_Forecast] = []  # of this step, by view
        self._num_steps = 0

    @property
    def is_eager(self) -> bool:
        """Whether it has still so much to learn that it should predict even what nobody can use."""
        return self._num_steps <= _EAGER

    def step_begins(self) -> None:
        self._forecasts.clear()
        self._num_steps += 1

    def predict(self, view: View) -> Probabilities:
        """Of each token to use each expert of the layers after the view's, as many as are foretold or left."""
        first = view.index + 1
        targets = slice(first, min(self._num_layers, first + self.max_distance))
        num_targets = targets.stop - targets.start
        shape = (num_targets, len(self._predictors) + 1, len(view.requests), self._num_experts)
        features = np.zeros(shape, dtype=np.float32)
        features[:, -1] = 1.0
        for i, predictor in enumerate(self._predictors):
            scores = predictor.scores(targets, view)
            if scores is not None:
                features[:, i] = scores
        weights = self._weights[int(view.index >= 0), :num_targets, None]  # [D, 1, F + 1]
        logits = weights @ features.reshape(*shape[:2], -1)
        probabilities: Probabilities = np.tanh(0.5 * logits).reshape(num_targets, *shape[2:])
        probabilities += 1.0
        probabilities *= 0.5
        self._forecasts.append(_Forecast(view, features, probabilities))
        return probabilities

    def observe(self, index: int, view: View, chosen: NDArray[np.bool_]) -> dict[int, tuple[int, int]]:
        """The `index`-th layer was routed: chosen [T, E].

        -> by distance, how many of its uses were among each token's k likeliest, and of how many. Only of the steps
        that are learned from.
        """
        recalls: dict[int, tuple[int, int]] = {}
        if self.is_eager or self._num_steps % _SELDOM == 0:
            num_uses = int(np.count_nonzero(chosen))
            last = self._num_experts - self._num_active
            rows = np.arange(len(chosen))[:, None]
            for forecast in self._forecasts:
                distance = index - forecast.view.index
                if not 1 <= distance <= len(forecast.probabilities):
                    continue
                self._learn(forecast, distance, chosen, num_uses)
                top = np.argpartition(forecast.probabilities[distance - 1], last, axis=-1)[:, last:]
                recalls[distance] = (int(np.count_nonzero(chosen[rows, top])), num_uses)
        for predictor in self._predictors:
            predictor.observe(index, view, chosen)
        return recalls

    def ended(self, request: int) -> None:
        for predictor in self._predictors:
            predictor.ended(request)

    def _learn(self, forecast: _Forecast, distance: int, chosen: NDArray[np.bool_], num_uses: int) -> None:
        error = forecast.probabilities[distance - 1] - chosen
        features = forecast.features[distance - 1]
        gradient = features.reshape(len(features), -1) @ error.reshape(-1)
        gradient /= max(1, num_uses)
        at = (int(forecast.view.index >= 0), distance - 1)
        self._squares[at] += gradient**2
        self._weights[at] -= _STEP * gradient / np.sqrt(self._squares[at])


def used_by_any(probabilities: Probabilities, scale: float = 1.0) -> NDArray[np.float32]:
    """Probability [D, E] that some token uses an expert; `scale`: tokens in the step for each one given."""
    none = np.log1p(-np.minimum(probabilities, 0.9999)).sum(axis=1) * scale
    return np.asarray(-np.expm1(none), dtype=np.float32)
