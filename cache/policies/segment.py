"""`segment`: evict the expert least expected in the coming tokens of the running requests (design, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cache.expert_key import ExpertKey
from cache.policies.use_model import Rows, UseModel

_STAGING_SHARE = 0.25  # of the slots, for what only prompts have asked for, while others decode
_NEXT_REQUEST = 0.1  # weight of the popularity in all requests, on behalf of those to come
_DISTANCE_BASE = 1.0  # an expert's worth is its expectation / (this + share of the layer cycle until its layer runs)
_HORIZON_BASE, _HORIZON_SLOPE = 1.0, 2.5  # tokens ahead = base + slope * tokens whose experts the slots hold
_INFINITE = np.float32(np.inf)


class _Plan:
    """Whose tokens a step has: one of each decoding request, several of each prompt."""

    def __init__(self, requests: Sequence[int], row_of: Callable[[int], int]) -> None:
        self.requests = list(requests)
        tokens: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            tokens.setdefault(request, []).append(i)
        self.decoding = [request for request, of in tokens.items() if len(of) == 1]
        self.decoding_tokens = [tokens[request][0] for request in self.decoding]
        self.prompts = [(row_of(request), of) for request, of in tokens.items() if len(of) > 1]
        rows = [row_of(request) for request in self.decoding]
        in_order = bool(rows) and rows == list(range(rows[0], rows[0] + len(rows)))
        self.rows: Rows = slice(rows[0], rows[0] + len(rows)) if in_order else np.asarray(rows, dtype=np.int64)


class SegmentPolicy:
    """Ranks experts by the discounted time to their next use by any running request, and by their layer's place.

    Each request's expectation is a row of `UseModel`; they meet as 1 - product(1 - V). The more tokens' experts the
    slots hold, the farther ahead the discount looks. The expectation of a layer's experts changes when that layer runs,
    and when a request ends; a decision is a minimum over arrays.
    """

    def __init__(self, num_slots: int, layers: Sequence[int], num_experts: int) -> None:
        num_layers = len(layers)
        shape = (num_layers, num_experts)
        self._num_slots = num_slots
        self._layers = list(layers)
        self._idx = {layer: i for i, layer in enumerate(layers)}
        self._num_experts = num_experts
        self._model = UseModel(num_layers, num_experts)
        self._unlikely = np.ones((num_layers, 0, num_experts), dtype=np.float32)  # 1 - V of each row
        self._worth = np.zeros(shape, dtype=np.float32)
        self._absent = np.full(shape, _INFINITE)  # 0 for resident experts
        self._staged = np.zeros(shape, dtype=np.bool_)  # resident for prompts alone
        self._has_staged = False
        distance = (np.arange(num_layers)[None, :] - np.arange(num_layers)[:, None] - 1) % num_layers + 1
        self._nearness = (1.0 / (_DISTANCE_BASE + distance / num_layers)).astype(np.float32)[:, :, None]  # [now, L, 1]
        self._row_of: dict[int, int] = {}  # request -> row
        self._free_rows: list[int] = []
        self._decoding: set[int] = set()  # requests
        self._plan: _Plan | None = None
        self._current = 0
        self._is_prefill = False
        self._in_use: NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # experts of this call
        self._of_decoding: NDArray[np.bool_] = np.zeros(num_experts, dtype=np.bool_)  # those that are not a prompt's
        self._values: NDArray[np.float32] | None = None  # of what may be evicted in this call, infinite for all else
        self._num_used = 0.0  # distinct experts of a call, on average
        self._gamma = 0.8  # until the first step that only decodes

    def insert(self, key: ExpertKey) -> None:
        i = self._idx[key.layer]
        self._absent[i, key.expert] = 0.0
        if self._is_prefill and i == self._current and not self._of_decoding[key.expert]:
            self._staged[i, key.expert] = True

    def touch(self, key: ExpertKey) -> None:
        pass

    def remove(self, key: ExpertKey) -> None:
        i = self._idx[key.layer]
        self._absent[i, key.expert] = _INFINITE
        self._staged[i, key.expert] = False
        if self._values is not None:
            self._values[i, key.expert] = _INFINITE

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        if self._values is None:
            self._values = self._rank()
            self._values[self._current, self._in_use] = _INFINITE  # pinned, and the farthest: not asked one by one
        found = None
        if self._is_staging_full():
            found = self._least(np.where(self._staged, self._values, _INFINITE), evictable)
        if found is None:
            found = self._least(self._values, evictable)
        if found is None:  # another wave of this call, or another thread's: what was pinned may no longer be
            self._values = self._rank()
            found = self._least(self._values, evictable)
        return found

    def _rank(self) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self._worth * self._nearness[self._current] + self._absent
        return values

    def _least(self, values: NDArray[np.float32], evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The evictable expert of least value; those that turn out not to be are struck out of `values`."""
        flat = values.reshape(-1)
        while True:
            at = int(flat.argmin())
            if flat[at] == _INFINITE:
                return None
            i, expert = divmod(at, self._num_experts)
            key = ExpertKey(self._layers[i], expert)
            if evictable(key):
                return key
            flat[at] = _INFINITE

    def _is_staging_full(self) -> bool:
        """Whether prompts hold their share of the slots, and requests that decode need the others."""
        if not (self._is_prefill and self._decoding):
            return False
        return int(np.count_nonzero(self._staged)) >= max(1.0, _STAGING_SHARE * self._num_slots)

    def observe(self, layer: int, requests: Sequence[int], chosen: Sequence[Sequence[int]], is_prefill: bool) -> None:
        if self._num_slots >= self._worth.size:  # all experts fit
            return
        i = self._idx[layer]
        plan = self._plan
        if plan is None or plan.requests != list(requests):
            plan = self._plan = _Plan(requests, self._row)
            self._decoding.update(plan.decoding)
        self._current, self._is_prefill, self._values = i, is_prefill, None
        routed = np.asarray(chosen, dtype=np.int64)  # [tokens, k]
        self._in_use = routed[0] if len(routed) == 1 else np.unique(routed)
        decoded = routed[plan.decoding_tokens] if plan.prompts else routed
        if is_prefill or self._has_staged:
            self._of_decoding[:] = False
            self._of_decoding[decoded] = True
            self._staged[i, self._of_decoding] = False
            self._has_staged = is_prefill or bool(self._staged.any())
        if plan.decoding:
            if i == 0 and not plan.prompts:
                self._look_ahead(len(self._in_use))
            self._unlikely[i, plan.rows] = self._model.step(i, plan.rows, decoded, self._gamma)
        for row, tokens in plan.prompts:
            self._unlikely[i, row] = self._model.prompt(i, row, routed[tokens])
        self._weigh(i)

    def _weigh(self, at: int | slice) -> None:
        """The chance that a running request, or one to come, soon uses the experts of a layer or several."""
        needless = np.multiply.reduce(self._unlikely[at], axis=-2)
        needless *= 1.0 - _NEXT_REQUEST * self._model.popularity[at]
        self._worth[at] = 1.0 - needless

    def ended(self, request: int) -> None:
        self._plan = None
        row = self._row_of.pop(request, None)
        if row is None:
            return
        self._free_rows.append(row)
        self._decoding.discard(request)
        self._unlikely[:, row] = 1.0
        self._weigh(slice(None))
        self._values = None

    def _look_ahead(self, num_used: int) -> None:
        """The discount of a token: over as many as an expert that is kept may wait for its use."""
        self._num_used += (0.05 if self._num_used else 1.0) * (num_used - self._num_used)
        num_tokens = self._num_slots / (len(self._layers) * self._num_used)
        self._gamma = math.exp(-1.0 / (_HORIZON_BASE + _HORIZON_SLOPE * num_tokens))

    def _row(self, request: int) -> int:
        row = self._row_of.get(request)
        if row is None:
            if not self._free_rows:
                num = len(self._row_of)
                more = max(1, num)
                self._free_rows = list(range(num + more - 1, num - 1, -1))
                self._model.grow(num + more)
                self._unlikely = np.pad(self._unlikely, ((0, 0), (0, more), (0, 0)), constant_values=1.0)
            row = self._row_of[request] = self._free_rows.pop()
            self._model.start(row)
        return row
