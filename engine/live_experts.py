"""What the scheduler may know of a running engine's experts: who is likely to use which, and which are in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from engine.batch import Batch
from engine.request import Request
from engine.signatures import ExpertSignatures
from kernels.backend import Routing


class LiveExperts:
    """An `engine.expert_aware.ExpertView` that learns as a `RoutingObserver`; idle while all experts fit."""

    def __init__(self, cache: ExpertCache, keys: Sequence[Sequence[ExpertKey]], num_active: int) -> None:
        """`keys`: of each layer with experts, in the router's order."""
        self._cache = cache
        self._keys = [key for of_layer in keys for key in of_layer]
        self._signatures = ExpertSignatures(len(keys), len(keys[0]), num_active)
        self._num_active = num_active
        self._batch: Batch | None = None
        self._chosen: list[bytes] = []  # of each layer so far, int32 [T, k]: kept as they come, which costs least
        self._ids: Tensor | None = None
        self._view = memoryview(b"")  # of `_ids`

    @property
    def is_short(self) -> bool:
        return not self._cache.holds_all

    def uses(self, requests: Sequence[Request]) -> NDArray[np.float32]:
        return self._signatures.uses(
            [request.number for request in requests], [request.next_token_id for request in requests]
        )

    def resident(self) -> NDArray[np.bool_]:
        resident = self._cache.resident()
        return np.fromiter((key in resident for key in self._keys), dtype=np.bool_, count=len(self._keys))

    def request_begins(self, number: int, prompt_token_ids: Sequence[int]) -> None:
        """A request is queued."""
        if self.is_short:
            self._signatures.expect(number, prompt_token_ids)

    def step_begins(self, batch: Batch) -> None:
        self._batch, self._chosen = batch, []

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        if not self.is_short:
            return
        if routing.ids is not self._ids:  # mostly the same memory, written again by each layer's router
            self._ids = routing.ids
            self._view = routing.ids.numpy().data
        self._chosen.append(self._view.tobytes())

    def step_ends(self) -> None:
        if self._chosen and self._batch is not None:
            tokens = self._batch.token_ids.tolist()
            shape = (len(self._chosen), len(tokens), self._num_active)
            chosen = np.frombuffer(b"".join(self._chosen), dtype=np.int32).reshape(shape)
            self._signatures.observe(self._batch.requests, tokens, chosen.swapaxes(0, 1))

    def request_ends(self, number: int) -> None:
        self._signatures.ended(number)
