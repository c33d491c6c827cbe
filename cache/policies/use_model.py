"""How soon a request uses each expert again, learned as requests run. Knows rows of counts; no cache and no slots.

For a request and an expert, V = E[gamma^(n - 1)], n being the tokens until the next use: 1 if the next token uses it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Rows = slice | NDArray[np.int64]  # of the requests in a step

_TIME_SCALES = np.asarray((4.0, 25.0, 150.0), dtype=np.float32)  # tokens over which the counts of a request decay
_KEEP = np.exp(-1.0 / _TIME_SCALES)[:, None]  # [3, 1] of a count, from token to token
_FLOOR = np.float32(0.02)  # uses that each token adds to those it has, so that every count has a logarithm
_USED = np.float32(1.0) + _FLOOR
_POPULARITY_SCALE = 2000.0  # tokens of all requests
_NEXT_REQUEST = 0.1  # weight of the popularity in all requests, on behalf of those to come
_NUM_COUNTS = len(_TIME_SCALES)
_NUM_FEATURES = _NUM_COUNTS + 3
_WEIGHTS = (0.3, 0.25, 0.4, 0.45, 0.0, 0.0)  # of the logarithms of the counts, the company, the popularity's, and 1
_PRIOR = np.eye(_NUM_FEATURES) * 50.0  # how firmly those are held
_NEWTON_STEPS = 16  # observed calls between updates of the weights
_LEARN_EVERY, _LEARN_SELDOM = 5, 20  # calls
_EAGER = 4096  # observed calls until it is seldom
_COMPANY_PRIOR = 12.0  # tokens for which an expert's companions are taken to be as popular as ever
_COMPANY_CALLS = 8  # at least, between updates of a layer's table,
_COMPANY_SHARE, _COMPANY_TOKENS = 8, 32  # and of the tokens counted so far one in that many, or that many tokens
_COMPANY_MEMORY = 4000.0  # tokens after which what was counted counts half
_MAX_PROMPT_TOKENS = 64  # of a chunk that the tables learn from


class _Estimate(NamedTuple):
    """Of one request, at one layer."""

    row: int
    features: Floats  # [3 + k, E]: of counts, and of the company of each expert just chosen
    unlikely: Floats  # 1 - V [E]


class UseModel:
    """A logistic model over decayed counts and company, with weights shared by all layers.

    Features: logarithms of the request's own counts at three time scales and of the popularity in all requests; and the
    company, the mean over the experts just chosen of log P(e next | e' now) / P(e), from tables counted as requests
    run. The weights follow by Newton steps on the error against y + (1 - y) gamma V', where y says whether the next
    token used the expert and V' is the estimate after it.

    Small arrays cost by the call, so that layers are done several at a time. Uses are kept with the floor added.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        shape = (num_layers, num_experts)
        self._num_experts = num_experts
        self._num_rows = 0
        self._counts = np.zeros((num_layers, 0, _NUM_COUNTS, num_experts), dtype=np.float32)
        self._before = np.zeros((num_layers, 0, num_experts), dtype=np.float32)  # uses of the last token
        self._rows: Rows = slice(0)  # of the last step,
        self._last: list[Floats | None] = [None] * num_layers  # and their uses [N, E], not in `_before` yet
        self._popularity = np.full(shape, 1.0 / num_experts, dtype=np.float32)  # share of tokens
        self._log_popularity = np.log(self._popularity)
        self.unlikely_to_come = 1.0 - _NEXT_REQUEST * self._popularity  # 1 - V of requests to come [L, E]
        self._together = np.zeros((*shape, num_experts), dtype=np.float32)
        self._alone = np.zeros(shape, dtype=np.float32)
        self._company = np.zeros((*shape, num_experts), dtype=np.float32)
        self._first = np.arange(num_layers)[:, None, None] * num_experts  # [L, 1, 1] of the rows of each table
        # numpy takes a short way, of a third of the time, where all operands are of one shape and without gaps
        self._keep = np.ascontiguousarray(np.broadcast_to(_KEEP, (1, 1, _NUM_COUNTS, num_experts)))
        self._one, self._half = np.full((2, 1, 1, num_experts), [[[[1.0]]], [[[0.5]]]], dtype=np.float32)
        self._pairs: list[list[tuple[Floats, Floats]]] = [[] for _ in range(num_layers)]  # not counted: [N, E], [N, E]
        self._num_uncounted = [0] * num_layers  # tokens of those
        self._num_counted = [0] * num_layers
        self._curvature = _PRIOR.copy()
        self._num_calls = self._num_learned = 0
        self._kept: list[_Estimate | None] = [None] * num_layers
        self._seen: list[tuple[int, _Estimate, Floats, Floats]] = []  # layer, uses [E] and 1 - V [E] that came of it
        self._num_active = 1  # experts of a token
        self._use_weights(np.asarray(_WEIGHTS, dtype=np.float32))

    def grow(self, num_rows: int) -> None:
        """Make room for rows up to `num_rows`."""
        more = num_rows - self._num_rows
        self._counts = np.pad(self._counts, ((0, 0), (0, more), (0, 0), (0, 0)))
        self._before = np.pad(self._before, ((0, 0), (0, more), (0, 0)))
        self._num_rows = num_rows

    def start(self, row: int) -> None:
        """A new request takes the row; what is known of it is what is known of all."""
        self._settle(slice(0))
        self._counts[:, row] = (self._popularity[:, None] + _FLOOR) / (1.0 - _KEEP)
        self._before[:, row] = _FLOOR
        self._kept = [None if kept is None or kept.row == row else kept for kept in self._kept]

    def step(self, layers: slice, rows: Rows, chosen: NDArray[np.int64], gamma: float) -> Floats:
        """One token each of N requests, in D layers, routed to `chosen` [D, N, k]; returns 1 - V [D, N, E] after it.

        `rows` is the same object as long as the requests are the same.
        """
        if rows is not self._rows:
            self._settle(rows)
        used = self._uses(chosen)
        for i, layer_idx in enumerate(range(layers.start, layers.stop)):
            before, self._last[layer_idx] = self._last[layer_idx], used[i]
            self._learn_company(layer_idx, self._before[layer_idx, rows].copy() if before is None else before, used[i])
        counts = self._counts[layers, rows]  # [D, N, 3, E]
        counts *= self._keep
        counts += used[:, :, None]
        if not isinstance(rows, slice):  # indexing by an array has copied them
            self._counts[layers, rows] = counts
        features, unlikely = self._predict(layers, counts, chosen)
        every = _LEARN_EVERY if self._num_learned < _EAGER else _LEARN_SELDOM
        for i, layer_idx in enumerate(range(layers.start, layers.stop)):
            self._num_calls += 1
            if self._kept[layer_idx] is not None or self._num_calls % every == 0:
                self._learn(layer_idx, rows, features[i], used[i], unlikely[i], gamma)
        return unlikely

    def prompt(self, layer_idx: int, row: int, chosen: NDArray[np.int64]) -> Floats:
        """Tokens of one request's prompt, in order, routed to `chosen` [n, k]; returns 1 - V [E] after the last."""
        used = self._uses(chosen[None])[0]
        num = len(used)
        counts = self._counts[layer_idx, row]  # [3, E]
        counts *= _KEEP**num
        counts += _KEEP ** np.arange(num - 1, -1, -1, dtype=np.float32) @ used
        recent = used[-_MAX_PROMPT_TOKENS:]
        self._learn_company(layer_idx, recent[:-1], recent[1:])
        self._before[layer_idx, row] = used[-1]
        unlikely = self._predict(slice(layer_idx, layer_idx + 1), counts[None, None], chosen[None, -1:])[1]
        return np.asarray(unlikely[0, 0])

    def _settle(self, rows: Rows) -> None:
        """Keep by row what the last step's requests used: the next one's are in these `rows`."""
        for layer_idx, used in enumerate(self._last):
            if used is not None:
                self._before[layer_idx, self._rows] = used
        self._last = [None] * len(self._last)
        self._rows = rows

    def _uses(self, chosen: NDArray[np.int64]) -> Floats:
        """Chosen [D, N, k] -> [D, N, E]."""
        num = chosen.shape[0] * chosen.shape[1]
        used = np.empty((*chosen.shape[:2], self._num_experts), dtype=np.float32)
        used.fill(_FLOOR)
        if num > 1:
            chosen = chosen.reshape(num, -1) + self._num_experts * np.arange(num)[:, None]
        used.put(chosen, _USED, "clip")
        return used

    def _predict(self, layers: slice, counts: Floats, chosen: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """counts [D, N, 3, E], chosen [D, N, k] -> features [D, N, 3 + k, E] and 1 - V [D, N, E]."""
        num_layers, num, num_active = chosen.shape
        if num_active != self._num_active:
            self._num_active = num_active
            self._use_weights(self._weights)
            self._kept = [None] * len(self._kept)  # estimates from other numbers of experts are not compared
            self._seen.clear()
        features = np.empty((num_layers, num, _NUM_COUNTS + num_active, self._num_experts), dtype=np.float32)
        np.log(counts, out=features[:, :, :_NUM_COUNTS])
        company, out = self._company[layers].reshape(-1, self._num_experts), features[:, :, _NUM_COUNTS:]
        company.take(chosen if num_layers == 1 else chosen + self._first[:num_layers], 0, out, "clip")
        unlikely: Floats
        if num_layers == num == 1:
            unlikely = self._scale.dot(features[0, 0]).reshape(1, 1, -1)
        else:
            unlikely = np.matmul(self._scale, features)
        unlikely += self._base[layers]
        np.tanh(unlikely, out=unlikely)  # 1 / (1 + exp(x)) = (1 + tanh(-x / 2)) / 2, which never overflows
        unlikely += self._one
        unlikely *= self._half
        return features, unlikely

    def _use_weights(self, weights: Floats) -> None:
        self._weights = weights
        self._scale = np.repeat(-0.5 * weights[: _NUM_COUNTS + 1], [*[1] * _NUM_COUNTS, self._num_active])  # [3 + k]
        self._scale[_NUM_COUNTS:] /= self._num_active
        self._base = (-0.5 * (weights[-2] * self._log_popularity + weights[-1]))[:, None]  # [L, 1, E]

    def _learn_company(self, layer_idx: int, before: Floats, after: Floats) -> None:
        """Count who follows whom and how often each is used; the logarithms are taken once in a while."""
        pairs = self._pairs[layer_idx]
        pairs.append((before, after))
        self._num_uncounted[layer_idx] = num = self._num_uncounted[layer_idx] + len(after)
        counted = self._num_counted[layer_idx]
        if counted < 2 * _COMPANY_CALLS:
            if num < counted:
                return
        elif len(pairs) < _COMPANY_CALLS or num < min(counted // _COMPANY_SHARE, _COMPANY_TOKENS):
            return
        earlier = np.concatenate([pair[0] for pair in pairs]) - _FLOOR
        later = np.concatenate([pair[1] for pair in pairs]) - _FLOOR
        pairs.clear()
        self._num_uncounted[layer_idx] = 0
        self._num_counted[layer_idx] = counted = counted + num
        popularity = self._popularity[layer_idx]
        if num:
            rate = max(num / (counted + 20.0), min(1.0, num / _POPULARITY_SCALE))
            popularity += rate * (later.mean(axis=0) - popularity)
            self._log_popularity[layer_idx] = np.log(popularity + 0.002)
            self._base[layer_idx, 0] = -0.5 * (self._weights[-2] * self._log_popularity[layer_idx] + self._weights[-1])
            self.unlikely_to_come[layer_idx] = 1.0 - _NEXT_REQUEST * popularity
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
        if kept is None:
            at = self._num_learned % len(ids)
            self._kept[layer_idx] = _Estimate(ids[at], features[at].copy(), unlikely[at].copy())
        elif kept.row in ids:
            at = ids.index(kept.row)
            self._seen.append((layer_idx, kept, used[at].copy(), unlikely[at].copy()))
            self._num_learned += 1
            if len(self._seen) == _NEWTON_STEPS:
                self._take_newton_step(gamma)

    def _take_newton_step(self, gamma: float) -> None:
        layers, estimates, used, unlikely = zip(*self._seen, strict=True)
        self._seen.clear()
        features = np.asarray([estimate.features for estimate in estimates])  # [S, 3 + k, E]
        was = np.empty((_NUM_FEATURES, len(layers), self._num_experts), dtype=np.float32)
        was[:_NUM_COUNTS] = features[:, :_NUM_COUNTS].swapaxes(0, 1)
        np.add.reduce(features[:, _NUM_COUNTS:], axis=1, out=was[_NUM_COUNTS])
        was[_NUM_COUNTS] /= self._num_active
        after = np.asarray(used) - _FLOOR  # [S, E]
        was[-2] = self._log_popularity[list(layers)]
        was[-1] = 1.0
        flat = was.reshape(_NUM_FEATURES, -1)
        missed = np.asarray([estimate.unlikely for estimate in estimates])
        error = missed - (1.0 - after) * (1.0 - gamma + gamma * np.asarray(unlikely))  # target - V
        gradient = flat @ error.reshape(-1)
        self._curvature += (flat * (missed - missed * missed).reshape(-1)) @ flat.T
        self._use_weights(self._weights + np.linalg.solve(self._curvature, gradient).astype(np.float32))
        self._curvature += 0.001 * (_PRIOR - self._curvature)  # old errors fade, never the prior
