"""Which experts each request is likely to ask for next, by what it asked for of late. Knows arrays; no scheduler."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_KEEP = np.asarray((0.8, 0.97), dtype=np.float32)  # of a count from token to token, at two time scales
_PRIOR_TOKENS = 2.0  # for which a request is taken to do what is expected of it before it has run
_POPULARITY_KEEP = 0.999
_MAX_CHUNK = 64  # tokens of a prompt's chunk that are counted, the last ones
_TOKEN_MEMORY = 0.7  # of where a token went before, when it comes again
_TOKEN_TRUST = 0.9  # in where a token went before, beside what its request does, once it has come often
_MAX_TOKENS = 4096  # that are remembered, the least recently seen forgotten first
_MAX_PROMPT = 256  # tokens of a prompt that its expectation is made of


class ExpertSignatures:
    """Expected uses per token of all experts [K], K = layers x experts, for each request.

    The mean of decayed shares at two time scales; where the next token is known, above all where that token went
    before, in any request (a pre-gate by token identity). Before a request has run, it is expected to go where the
    tokens of its prompt went, else where all do.
    """

    def __init__(self, num_layers: int, num_experts: int, num_active: int) -> None:
        self._num_experts = num_experts
        self._first = np.arange(num_layers, dtype=np.int64)[:, None] * num_experts
        self._num_keys = num_layers * num_experts
        self._popularity = np.full(self._num_keys, num_active / num_experts, dtype=np.float32)
        self._counts: dict[int, Floats] = {}  # request -> [S, K]
        self._weights: dict[int, Floats] = {}  # request -> [S, 1] decayed tokens
        self._priors: dict[int, Floats] = {}  # request -> [K]
        self._of_token: OrderedDict[int, NDArray[np.float16]] = OrderedDict()
        self._num_seen: dict[int, int] = {}  # how often each of these tokens came

    def uses(self, requests: Sequence[int], next_tokens: Sequence[int | None] | None = None) -> Floats:
        """Expected uses in the next token [N, K]; `next_tokens`: where it is known which that is."""
        uses = np.stack([self._of(request) for request in requests])
        for row, token in zip(uses, next_tokens or (), strict=False):
            rates = None if token is None else self._of_token.get(token)
            if token is not None and rates is not None:
                trust = np.float32(_TOKEN_TRUST * self._num_seen[token] / (self._num_seen[token] + 1))
                row += trust * (rates - row)
        return uses

    def expect(self, request: int, token_ids: Sequence[int]) -> None:
        """A request has come with this prompt. Told again it is forgotten and expected anew."""
        known = [rates for token in token_ids[-_MAX_PROMPT:] if (rates := self._of_token.get(token)) is not None]
        if known:
            self._priors[request] = np.mean(known, axis=0, dtype=np.float32)

    def observe(self, requests: Sequence[int], token_ids: Sequence[int], chosen: NDArray[np.integer]) -> None:
        """A step: each token's request, the token, and the experts it was routed to [T, L, k]."""
        rows: dict[int, list[int]] = {}
        for row, request in enumerate(requests):
            rows.setdefault(request, []).append(row)
        for request, its_rows in rows.items():
            self._count(request, chosen[its_rows[-_MAX_CHUNK:]], len(its_rows))
            for row in its_rows[-_MAX_CHUNK:]:
                self._remember(token_ids[row], (self._first + chosen[row]).ravel())

    def ended(self, request: int) -> None:
        """Forget it."""
        for table in (self._counts, self._weights, self._priors):
            table.pop(request, None)

    def _of(self, request: int) -> Floats:
        prior = self._priors.get(request, self._popularity)
        counts = self._counts.get(request)
        if counts is None:
            return prior
        shares: Floats = (counts + _PRIOR_TOKENS * prior) / (self._weights[request] + _PRIOR_TOKENS)
        mean: Floats = shares.mean(axis=0)
        return mean

    def _count(self, request: int, chosen: NDArray[np.integer], num_tokens: int) -> None:
        counts = self._counts.get(request)
        if counts is None:
            counts = self._counts[request] = np.zeros((len(_KEEP), self._num_keys), dtype=np.float32)
            self._weights[request] = np.zeros((len(_KEEP), 1), dtype=np.float32)
        keep = _KEEP[:, None] ** np.float32(num_tokens)
        counts *= keep
        age = _KEEP[:, None] ** np.arange(len(chosen) - 1, -1, -1, dtype=np.float32)  # [S, n]
        self._weights[request] = self._weights[request] * keep + age.sum(axis=1, keepdims=True)
        self._popularity *= np.float32(_POPULARITY_KEEP ** len(chosen))
        for row in range(len(chosen)):
            keys = (self._first + chosen[row]).ravel()
            counts[:, keys] += age[:, row : row + 1]
            self._popularity[keys] += np.float32(1.0 - _POPULARITY_KEEP)

    def _remember(self, token: int, keys: NDArray[np.int64]) -> None:
        rates = self._of_token.get(token)
        if rates is None:
            rates = self._of_token[token] = self._popularity.astype(np.float16)
            self._num_seen[token] = 0
            if len(self._of_token) > _MAX_TOKENS:
                forgotten, _ = self._of_token.popitem(last=False)
                del self._num_seen[forgotten]
        else:
            self._of_token.move_to_end(token)
        self._num_seen[token] += 1
        share = max(1.0 - _TOKEN_MEMORY, 1.0 / (self._num_seen[token] + 1))  # a mean of the first few
        rates *= np.float16(1.0 - share)
        rates[keys] += np.float16(share)
