"""Keeps which experts a running engine's tokens are routed to. Knows no file, and no one who asked for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache.trace import RoutingTrace
from engine.batch import Batch
from engine.models.spec import MoeSpec
from kernels.backend import Routing

_CHUNK_STEPS = 256  # kept as they came, until they are made arrays of together
_CHUNK_TOKENS = 4096

_Ids = NDArray[np.unsignedinteger]
_Tokens = NDArray[np.int64]  # request, position, token id of each


class TraceRecorder:
    """Sees every layer call of every step from when it is told to observe, and keeps a copy of the choices.

    Bounded: of the first `max_tokens`, then `when_full` is called, once. A step that failed leaves nothing. A token
    that was computed twice, after a preemption, is there once; one that was found in the prefix cache was not
    computed, and is not there.

    Between two layers the caches are cold, and any call into numpy or torch costs ten times what it does in a loop:
    so a layer's choices are kept as bytes, and made arrays of later.
    """

    def __init__(self, moe: MoeSpec, max_tokens: int, when_full: Callable[[], None]) -> None:
        self._moe = moe
        self._max_tokens = max_tokens
        self._when_full = when_full
        self._dtype = np.uint8 if moe.num_experts <= 256 else np.uint16
        self._num_prompt: dict[int, int] = {}  # of each request, all of it
        self._num_tokens = 0  # of the steps so far, beyond the bound in the last one
        self._chunks: list[tuple[_Ids, _Tokens]] = []  # [L, T, k], [T, 3]
        self._num_in_chunks = 0
        self._steps: list[tuple[Batch, list[bytes]]] = []  # not in a chunk yet
        self._batch: Batch | None = None
        self._layers: list[bytes] = []  # of this step so far, int32 [T, k] each
        self._ids: Tensor | None = None
        self._view = memoryview(b"")  # of `_ids`

    @property
    def is_full(self) -> bool:
        return self._num_tokens >= self._max_tokens

    def request_begins(self, number: int, num_prompt_tokens: int) -> None:
        """A request is queued, or was when recording began."""
        if not self.is_full:
            self._num_prompt[number] = num_prompt_tokens

    def step_begins(self, batch: Batch) -> None:
        self._batch, self._layers = batch, []

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        if routing.ids is not self._ids:  # mostly the same memory, written again by each layer's router
            self._ids = routing.ids
            self._view = routing.ids.numpy().data
        self._layers.append(self._view.tobytes())

    def step_ends(self) -> None:
        if self.is_full or self._batch is None:
            return
        self._steps.append((self._batch, self._layers))
        self._num_tokens += len(self._batch.requests)
        if len(self._steps) >= _CHUNK_STEPS or self._num_tokens - self._num_in_chunks >= _CHUNK_TOKENS:
            self._end_chunk()
        if self.is_full:
            self._when_full()

    def request_ends(self, number: int) -> None:
        """Nothing: its tokens stay."""

    def trace(self, domain: str = "") -> RoutingTrace:
        """What was recorded, requests in order of arrival. Not while a step runs."""
        self._end_chunk()
        tokens = np.concatenate([np.empty((0, 3), dtype=np.int64), *(of_chunk for _, of_chunk in self._chunks)])
        tokens = tokens[: self._max_tokens]
        order = np.lexsort((tokens[:, 1], tokens[:, 0]))  # stable: of a token computed twice, the later one is last
        tokens = tokens[order]
        is_last = np.append((np.diff(tokens[:, :2], axis=0) != 0).any(axis=1), True)[: len(order)]
        order, tokens = order[is_last], tokens[is_last]
        requests, first = np.unique(tokens[:, 0], return_index=True)
        offsets = np.append(first, len(order)).astype(np.int64)
        num_prompt = np.asarray([self._num_prompt[number] for number in requests.tolist()], dtype=np.int64)
        is_prompt = tokens[:, 1] < np.repeat(num_prompt, np.diff(offsets))
        num_before = np.append(0, is_prompt.cumsum())  # prompt tokens before each row
        return RoutingTrace(
            ids=self._ids_of(order),
            seq_off=offsets,
            num_prompt=num_before[offsets[1:]] - num_before[offsets[:-1]],
            num_experts=self._moe.num_experts,
            layers=self._moe.layers,
            domains=(domain,) * len(requests),
            token_ids=tokens[:, 2].copy(),
        )

    def _ids_of(self, order: NDArray[np.int64]) -> _Ids:
        """The experts of these rows [T, L, k]; chunk by chunk, so that there are not three copies of all."""
        place = np.full(self._num_in_chunks, -1)  # of each row, where it goes
        place[order] = np.arange(len(order))
        ids = np.empty((len(order), len(self._moe.layers), self._moe.num_active), dtype=self._dtype)
        begin = 0
        for of_chunk, tokens in self._chunks:
            places = place[begin : begin + len(tokens)]
            kept = places >= 0
            ids[places[kept]] = of_chunk.transpose(1, 0, 2)[kept]
            begin += len(tokens)
        return ids

    def _end_chunk(self) -> None:
        if not self._steps:
            return
        shape = (len(self._moe.layers), -1, self._moe.num_active)
        ids = [np.frombuffer(b"".join(layers), dtype=np.int32).reshape(shape) for _, layers in self._steps]
        tokens = [
            (np.asarray(batch.requests), batch.sequences.positions.cpu().numpy(), batch.token_ids.numpy())
            for batch, _ in self._steps
        ]
        columns = [np.concatenate(column) for column in zip(*tokens, strict=True)]
        self._chunks.append((np.concatenate(ids, axis=1).astype(self._dtype), np.stack(columns, axis=1)))
        self._num_in_chunks = self._num_tokens
        self._steps = []
