"""How soon a request uses each expert again, learned as requests run. Knows rows of counts; no cache and no slots.

For a request and an expert, V = E[gamma^(n - 1)], n being the tokens until the next use: 1 if the next token uses it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Rows = slice | NDArray[np.int64]  # of the requests in a step

_TIME_SCALES = np.asarray((4.0, 25.0, 150.0), dtype=np.float32)  # tokens over which the counts of a request decay
_KEEP = np.exp(-1.0 / _TIME_SCALES)[:, None, None]  # [3, 1, 1] of a count, from token to token
_FLOORS = 0.02 / (1.0 - _KEEP)  # added to counts before their logarithm: 0.02 uses a token
_POPULARITY_SCALE = 2000.0  # tokens of all requests
_NUM_FEATURES = len(_TIME_SCALES) + 3
_WEIGHTS = (0.3, 0.25, 0.4, 0.45, 0.0, 0.0)  # of the logarithms of the counts, the company, the popularity's, and 1
_PRIOR = np.eye(_NUM_FEATURES) * 50.0  # how firmly those are held
_NEWTON_STEPS = 16  # observed calls between updates of the weights
_LEARN_EVERY = 5  # calls
_COMPANY_PRIOR = 12.0  # tokens for which an expert's companions are taken to be as popular as ever
_COMPANY_CALLS, _COMPANY_TOKENS = 8, 16  # at least, between updates of a layer's table
_COMPANY_MEMORY = 4000.0  # tokens after which what was counted counts half
_MAX_PROMPT_TOKENS = 64  # of a chunk that the tables learn from


class UseModel:
    """A logistic model over decayed counts and company, with weights shared by all layers.

    Features: logarithms of the request's own counts at three time scales and of the popularity in all requests; and the
    company, the mean over the experts just chosen of log P(e next | e' now) / P(e), from tables counted as requests
    run. The weights follow by Newton steps on the error against y + (1 - y) gamma V', where y says whether the next
    token used the expert and V' is the estimate after it.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._num_experts = num_experts
        self._num_rows = 0
        self._counts = np.zeros((num_layers, len(_TIME_SCALES), 0, num_experts), dtype=np.float32)
        self._before = np.zeros((num_layers, 0, num_experts), dtype=np.float32)  # what the last token chose
        self.popularity = np.full((num_layers, num_experts), 1.0 / num_experts, dtype=np.float32)  # share of tokens
        self._log_popularity = np.log(self.popularity)
        self._together = np.zeros((num_layers, num_experts, num_experts), dtype=np.float32)
        self._alone = np.zeros((num_layers, num_experts), dtype=np.float32)
        self._company = np.zeros((num_layers, num_experts, num_experts), dtype=np.float32)
        self._pairs: list[list[tuple[Floats, Floats]]] = [[] for _ in range(num_layers)]  # not counted: [N, E], [N, E]
        self._num_uncounted = [0] * num_layers  # tokens of those
        self._num_counted = [0] * num_layers
        self._weights = np.asarray(_WEIGHTS, dtype=np.float32)
        self._curvature = _PRIOR.copy()
        self._gradient = np.zeros(_NUM_FEATURES)
        self._num_calls = self._num_learned = 0
        self._kept: list[tuple[int, Floats, Floats] | None] = [None] * num_layers  # row, features [F, E], V [E]

    def grow(self, num_rows: int) -> None:
        """Make room for rows up to `num_rows`."""
        more = num_rows - self._num_rows
        self._counts = np.pad(self._counts, ((0, 0), (0, 0), (0, more), (0, 0)))
        self._before = np.pad(self._before, ((0, 0), (0, more), (0, 0)))
        self._num_rows = num_rows

    def start(self, row: int) -> None:
        """A new request takes the row; what is known of it is what is known of all."""
        self._counts[:, :, row] = self.popularity[:, None] / (1.0 - _KEEP[:, 0])
        self._before[:, row] = 0.0
        self._kept = [None if kept is None or kept[0] == row else kept for kept in self._kept]

    def step(self, layer_idx: int, rows: Rows, chosen: NDArray[np.int64], gamma: float) -> Floats:
        """One token each of N requests, routed to `chosen` [N, k]; returns 1 - V [N, E] after it."""
        used = self._one_hot(chosen)
        counts = self._counts[layer_idx][:, rows]
        counts *= _KEEP
        counts += used
        before = self._before[layer_idx]
        self._learn_company(layer_idx, before[rows].copy(), used)
        before[rows] = used
        if not isinstance(rows, slice):  # indexing by an array has copied them
            self._counts[layer_idx][:, rows] = counts
        features, unlikely = self._predict(layer_idx, counts, used, chosen)
        self._num_calls += 1
        if self._kept[layer_idx] is not None or self._num_calls % _LEARN_EVERY == 0:
            self._learn(layer_idx, rows, features, used, unlikely, gamma)
        return unlikely

    def prompt(self, layer_idx: int, row: int, chosen: NDArray[np.int64]) -> Floats:
        """Tokens of one request's prompt, in order, routed to `chosen` [n, k]; returns 1 - V [E] after the last."""
        used = self._one_hot(chosen)
        num = len(used)
        weights = _KEEP[:, 0] ** np.arange(num - 1, -1, -1, dtype=np.float32)  # [3, n]
        counts = self._counts[layer_idx][:, row] * _KEEP[:, 0] ** num + weights @ used
        self._counts[layer_idx][:, row] = counts
        recent = used[-_MAX_PROMPT_TOKENS:]
        self._learn_company(layer_idx, recent[:-1], recent[1:])
        self._before[layer_idx, row] = used[-1]
        unlikely: Floats = self._predict(layer_idx, counts[:, None], used[-1:], chosen[-1:])[1][0]
        return unlikely

    def _one_hot(self, chosen: NDArray[np.int64]) -> Floats:
        used = np.zeros((len(chosen), self._num_experts), dtype=np.float32)
        if len(chosen) == 1:
            used[0, chosen[0]] = 1.0
        else:
            used[np.arange(len(chosen))[:, None], chosen] = 1.0
        return used

    def _predict(
        self, layer_idx: int, counts: Floats, used: Floats, chosen: NDArray[np.int64]
    ) -> tuple[Floats, Floats]:
        """Features [F, N, E] and 1 - V [N, E]."""
        features = np.empty((_NUM_FEATURES, *used.shape), dtype=np.float32)
        logs = features[:-3]
        np.add(counts, _FLOORS, out=logs)
        np.log(logs, out=logs)
        if len(chosen) == 1:
            np.add.reduce(self._company[layer_idx, chosen[0]], axis=0, out=features[-3, 0])
        else:
            np.matmul(used, self._company[layer_idx], out=features[-3])
        features[-2] = self._log_popularity[layer_idx]
        features[-1] = 1.0
        weights = self._weights.copy()
        weights[-3] /= chosen.shape[1]
        logits = weights @ features.reshape(_NUM_FEATURES, -1)
        odds = np.exp(np.minimum(logits, 30.0, out=logits))  # beyond that exp would overflow, some way on
        odds += 1.0
        unlikely: Floats = np.reciprocal(odds, out=odds).reshape(used.shape)
        return features, unlikely

    def _learn_company(self, layer_idx: int, before: Floats, after: Floats) -> None:
        """Count who follows whom and how often each is used; the logarithms are taken once in a while."""
        pairs = self._pairs[layer_idx]
        pairs.append((before, after))
        self._num_uncounted[layer_idx] = num = self._num_uncounted[layer_idx] + len(after)
        counted = self._num_counted[layer_idx]
        if num < min(counted, _COMPANY_TOKENS) or (counted >= _COMPANY_TOKENS and len(pairs) < _COMPANY_CALLS):
            return
        earlier = np.concatenate([pair[0] for pair in pairs])
        later = np.concatenate([pair[1] for pair in pairs])
        pairs.clear()
        self._num_uncounted[layer_idx] = 0
        self._num_counted[layer_idx] = counted = counted + num
        popularity = self.popularity[layer_idx]
        if num:
            rate = max(num / (counted + 20.0), min(1.0, num / _POPULARITY_SCALE))
            popularity += rate * (later.mean(axis=0) - popularity)
            self._log_popularity[layer_idx] = np.log(popularity + 0.002)
        keep = 0.5 ** (num / _COMPANY_MEMORY)
        together, alone = self._together[layer_idx], self._alone[layer_idx]
        together *= keep
        alone *= keep
        together += earlier.T @ later
        alone += earlier.sum(axis=0)
        ratio = together / (popularity + 1e-4) + _COMPANY_PRIOR
        ratio /= (alone + _COMPANY_PRIOR)[:, None]
        np.log(ratio, out=self._company[layer_idx])

    def _learn(
        self, layer_idx: int, rows: Rows, features: Floats, used: Floats, unlikely: Floats, gamma: float
    ) -> None:
        """Compare one request's last estimate with what has come, or keep one of this token's for the next."""
        kept, self._kept[layer_idx] = self._kept[layer_idx], None
        ids = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
        k = used[0].sum()
        if kept is None:
            at = self._num_learned % len(ids)
            features = features[:, at].copy()
            features[-3] /= k
            self._kept[layer_idx] = (ids[at], features, 1.0 - unlikely[at])
        elif kept[0] in ids:
            at = ids.index(kept[0])
            _, was, value = kept
            target = 1.0 - (1.0 - used[at]) * (1.0 - gamma + gamma * unlikely[at])
            self._gradient += was @ (target - value)
            self._curvature += (was * (value - value * value)) @ was.T
            self._num_learned += 1
            if self._num_learned % _NEWTON_STEPS == 0:
                self._weights += np.linalg.solve(self._curvature, self._gradient).astype(np.float32)
                self._gradient[:] = 0.0
                self._curvature += 0.001 * (_PRIOR - self._curvature)  # old errors fade, never the prior
