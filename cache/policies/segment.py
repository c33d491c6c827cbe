"""`segment`: evict the expert least expected in the coming tokens of the running requests (design, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableSequence, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from cache.expert_key import ExpertKey
from cache.policies.use_model import Rows, UseModel

_STAGING_SHARE = 0.25  # of the slots, for what only prompts have asked for, while others decode
_DISTANCE_BASE = 1.0  # an expert's worth is its expectation / (this + share of the layer cycle until its layer runs)
_HORIZON_BASE, _HORIZON_SLOPE = 1.0, 2.5  # tokens ahead = base + slope * tokens whose experts the slots hold
_INFINITE = np.float32(np.inf)
_SURE = 2.0  # the value, at least, of what this step is known to use; that of others is below 1
_FEW = 16  # of least value that are looked for at once


class _Plan:
    """Whose tokens a step has: one of each decoding request, several of each prompt."""

    def __init__(self, requests: Sequence[int], row_of: Callable[[int], int]) -> None:
        self.requests = list(requests)
        tokens: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            tokens.setdefault(request, []).append(i)
        self.prompts = [(row_of(request), of) for request, of in tokens.items() if len(of) > 1]
        decoding = sorted((row_of(request), request) for request, of in tokens.items() if len(of) == 1)
        self.decoding = [request for _, request in decoding]
        self.decoding_tokens = [tokens[request][0] for request in self.decoding]
        self.is_in_order = self.decoding_tokens == list(range(len(requests)))
        rows = [row for row, _ in decoding]
        is_run = bool(rows) and rows[-1] - rows[0] == len(rows) - 1
        self.rows: Rows = slice(rows[0], rows[-1] + 1) if is_run else np.asarray(rows, dtype=np.int64)


class SegmentPolicy:
    """Ranks experts by the discounted time to their next use by any running request, and by their layer's place.

    Each request's expectation is a row of `UseModel`; they meet as 1 - product(1 - V). The more tokens' experts the
    slots hold, the farther ahead the discount looks. What was observed since the last decision is worked out when the
    next one is asked for, all layers of it at once; a decision is a minimum over arrays.
    """

    def __init__(self, num_slots: int, layers: Sequence[int], num_experts: int) -> None:
        num_layers = len(layers)
        shape = (num_layers, num_experts)
        self._num_slots = num_slots
        self._idx = {layer: i for i, layer in enumerate(layers)}
        self._num_layers, self._num_experts = shape
        self._keys = [ExpertKey(layer, expert) for layer in layers for expert in range(num_experts)]
        self._model = UseModel(num_layers, num_experts)
        self._unlikely = np.ones((num_layers, 0, num_experts), dtype=np.float32)  # 1 - V of each row
        self._needless = np.ones(shape, dtype=np.float32)  # their product, and that nobody to come wants it
        self._ceiling = np.full(shape, _INFINITE)  # 1 for resident experts
        self._worth = np.full(shape, _INFINITE)  # ceiling - needless
        distance = np.arange(2 * num_layers) % num_layers + 1
        self._nearness = np.repeat(1.0 / (_DISTANCE_BASE + distance / num_layers), num_experts).astype(np.float32)
        self._staged = np.zeros(shape, dtype=np.bool_)  # resident for prompts alone
        self._has_staged = False
        self._sure = np.zeros(shape, dtype=np.bool_)  # this step is going to use it, its layer has not run yet
        self._is_foretold = False
        self._row_of: dict[int, int] = {}  # request -> row
        self._free_rows: list[int] = []
        self._decoding: set[int] = set()  # requests
        self._plan: _Plan | None = None
        self._pending: list[Sequence[Sequence[int]]] = []  # routed by layers one after the other, not worked out yet
        self._first_pending = 0
        self._current = 0
        self._is_prefill = False
        self._of_decoding: NDArray[np.bool_] = np.zeros(num_experts, dtype=np.bool_)  # used by more than a prompt
        self._values = np.full(num_layers * num_experts, _INFINITE)  # of what may be evicted in this call
        self._least_first: list[int] = []  # some of those of least value, the last first
        self._is_ranked = False
        self._ceiling_at, self._worth_at = _items(self._ceiling), _items(self._worth)
        self._needless_at, self._values_at = _items(self._needless), _items(self._values)
        self._num_used = 0.0  # distinct experts of a call, on average
        self._gamma = 0.8  # until the first step that only decodes

    def insert(self, key: ExpertKey) -> None:
        layer, expert = key
        i = self._idx[layer]
        at = i * self._num_experts + expert
        self._ceiling_at[at] = 1.0
        self._worth_at[at] = 1.0 - self._needless_at[at]
        if self._is_prefill and i == self._current and not self._of_decoding[expert]:
            self._staged[i, expert] = True

    def touch(self, key: ExpertKey) -> None:
        pass

    def remove(self, key: ExpertKey) -> None:
        layer, expert = key
        at = self._idx[layer] * self._num_experts + expert
        self._ceiling_at[at] = self._worth_at[at] = self._values_at[at] = math.inf
        if self._has_staged:
            self._staged.reshape(-1)[at] = False

    def victim(self, evictable: Callable[[ExpertKey], bool], *, sparing: bool = False) -> ExpertKey | None:
        if not self._is_ranked:
            self._catch_up()
            self._rank()
        found = None
        if self._is_staging_full():
            found = self._least_staged(evictable)
        if found is None:
            found = self._least(evictable, sparing=sparing)
        if found is None and not sparing:  # another wave of this call, or another thread's: what was pinned may be free
            self._rank()
            found = self._least(evictable)
        return found

    def will_use(self, keys: Sequence[Sequence[ExpertKey]]) -> None:
        self._sure[:] = False
        sure, idx, num_experts = self._sure.reshape(-1), self._idx, self._num_experts
        sure[[idx[layer] * num_experts + expert for of_layer in keys for layer, expert in of_layer]] = True
        self._is_foretold, self._is_ranked = True, False

    def _rank(self) -> None:
        start = (self._num_layers - 1 - self._current) * self._num_experts  # the layer after this one is the nearest
        nearness = self._nearness[start : start + len(self._values)]
        np.multiply(self._worth.reshape(-1), nearness, out=self._values)
        if self._is_foretold:
            sure = self._sure.reshape(-1) & (self._values < _INFINITE)
            self._values[sure] = nearness[sure] + _SURE
        self._is_ranked = True
        self._least_first.clear()

    def _least(self, evictable: Callable[[ExpertKey], bool], *, sparing: bool = False) -> ExpertKey | None:
        """The evictable expert of least value; those that turn out not to be are struck out until the next ranking."""
        values, least_first = self._values_at, self._least_first
        while least_first or self._look_for_least():
            at = least_first[-1]
            value = values[at]
            if sparing and _SURE < value < math.inf:
                return None
            if value != math.inf:  # neither struck out nor gone since
                key = self._keys[at]
                if evictable(key):
                    return key
                values[at] = math.inf
            least_first.pop()
        return None

    def _look_for_least(self) -> bool:
        """The next few of least value, the last in the list first; whether there are any."""
        values = self._values
        few = values.argpartition(_FEW)[:_FEW] if len(values) > _FEW else np.arange(len(values))
        few = few[values[few] < _INFINITE]
        few.sort()
        self._least_first += few[values[few].argsort(kind="stable")[::-1]].tolist()
        return bool(self._least_first)

    def _least_staged(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """As `_least`, of those that are here for prompts alone."""
        values = np.where(self._staged.reshape(-1), self._values, _INFINITE)
        while True:
            at = int(values.argmin())
            if values.item(at) == math.inf:
                return None
            key = self._keys[at]
            if evictable(key):
                return key
            values[at] = _INFINITE

    def _is_staging_full(self) -> bool:
        """Whether prompts hold their share of the slots, and requests that decode need the others."""
        if not (self._is_prefill and self._decoding):
            return False
        return int(np.count_nonzero(self._staged)) >= max(1.0, _STAGING_SHARE * self._num_slots)

    def observe(self, layer: int, requests: Sequence[int], chosen: Sequence[Sequence[int]], is_prefill: bool) -> None:
        if self._num_slots >= len(self._keys):  # all experts fit
            return
        i = self._idx[layer]
        pending, plan = self._pending, self._plan
        if plan is None or plan.requests != list(requests):
            self._catch_up()
            plan = self._plan = _Plan(requests, self._row)
            self._decoding.update(plan.decoding)
        elif pending and (i != self._first_pending + len(pending) or len(pending[0][0]) != len(chosen[0])):
            self._catch_up()
        if not self._pending:
            self._first_pending = i
        self._pending.append(chosen)
        self._current, self._is_prefill, self._is_ranked = i, is_prefill, False
        if self._is_foretold:
            self._sure[i] = False
            self._is_foretold = i + 1 < self._num_layers
        if is_prefill or self._has_staged:
            self._unstage(i, plan, chosen)
        if plan.prompts:
            self._catch_up()
        elif i == 0:
            self._look_ahead(len({expert for of_token in chosen for expert in of_token}))

    def _unstage(self, layer_idx: int, plan: _Plan, chosen: Sequence[Sequence[int]]) -> None:
        """What a decoding request uses is not there for prompts alone."""
        self._of_decoding[:] = False
        self._of_decoding[[expert for token in plan.decoding_tokens for expert in chosen[token]]] = True
        self._staged[layer_idx, self._of_decoding] = False
        self._has_staged = self._is_prefill or bool(self._staged.any())

    def _catch_up(self) -> None:
        """Work out what is expected after all that was observed."""
        if not self._pending:
            return
        plan = self._plan
        assert plan is not None
        first = self._first_pending
        layers = slice(first, first + len(self._pending))
        routed = np.asarray(self._pending, dtype=np.int64)  # [D, tokens, k]
        self._pending = []
        if plan.decoding:
            decoded = routed if plan.is_in_order else routed[:, plan.decoding_tokens]
            self._unlikely[layers, plan.rows] = self._model.step(layers, plan.rows, decoded, self._gamma)
        for row, tokens in plan.prompts:
            self._unlikely[first, row] = self._model.prompt(first, row, routed[0, tokens])
        self._weigh(layers)

    def _weigh(self, layers: slice) -> None:
        """The chance that a running request, or one to come, soon uses the experts of these layers."""
        unlikely, needless = self._unlikely[layers], self._needless[layers]
        of_running = unlikely[:, 0] if unlikely.shape[1] == 1 else np.multiply.reduce(unlikely, axis=1)
        np.multiply(of_running, self._model.unlikely_to_come[layers], out=needless)
        np.subtract(self._ceiling[layers], needless, out=self._worth[layers])

    def ended(self, request: int) -> None:
        self._catch_up()
        self._plan = None
        row = self._row_of.pop(request, None)
        if row is None:
            return
        self._free_rows.append(row)
        self._decoding.discard(request)
        self._unlikely[:, row] = 1.0
        self._weigh(slice(None))
        self._is_ranked = False

    def _look_ahead(self, num_used: int) -> None:
        """The discount of a token: over as many as an expert that is kept may wait for its use."""
        self._num_used += (0.05 if self._num_used else 1.0) * (num_used - self._num_used)
        num_tokens = self._num_slots / (self._num_layers * self._num_used)
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


def _items(array: NDArray[np.float32]) -> MutableSequence[float]:
    """The array's own items, in order: one at a time is got at several times faster so than through numpy."""
    return cast("MutableSequence[float]", array.reshape(-1).data)
