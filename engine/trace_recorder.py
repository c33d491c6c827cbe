"""Records which experts a running engine's tokens are routed to: `--record-trace FILE`."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache.trace import RoutingTrace
from engine.batch import Batch
from engine.models.spec import MoeSpec
from kernels.backend import Routing

_log = logging.getLogger(__name__)

MAX_TOKENS = 500_000


class TraceRecorder:
    """Sees every layer call of every step; keeps a copy of the choices, and writes them when it is closed.

    Bounded: after `max_tokens` nothing more is kept. A step that failed leaves nothing. A token that was computed
    twice, after a preemption, is there once; one that was found in the prefix cache was not computed, and is not there.
    """

    def __init__(self, path: Path, moe: MoeSpec, max_tokens: int = MAX_TOKENS) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # a place that cannot be written to is told at the start
        self._path = path
        self._moe = moe
        self._dtype = np.uint8 if moe.num_experts <= 256 else np.uint16
        self._left = max_tokens
        self._num_prompt: dict[int, int] = {}
        self._batch: Batch | None = None
        self._step: list[NDArray[np.int32]] = []  # of each layer so far [T, k]
        self._steps: list[tuple[Batch, NDArray[np.unsignedinteger]]] = []  # [T, L, k]

    def request_begins(self, number: int, num_prompt_tokens: int) -> None:
        if self._left > 0:
            self._num_prompt[number] = num_prompt_tokens

    def step_begins(self, batch: Batch) -> None:
        self._batch, self._step = batch, []

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        if self._left > 0:
            self._step.append(routing.ids.numpy().copy())

    def step_ends(self) -> None:
        if self._left <= 0 or self._batch is None:
            return
        self._steps.append((self._batch, np.stack(self._step, axis=1).astype(self._dtype)))
        self._left -= len(self._batch.requests)
        if self._left <= 0:
            _log.warning("routing trace %s is full: what follows is not recorded", self._path.name)

    def request_ends(self, number: int) -> None:
        """Nothing: its tokens stay."""

    def close(self) -> None:
        """Write the file."""
        trace = self.trace()
        trace.save(self._path)
        _log.info("routing of %d tokens of %d requests is in %s", trace.num_tokens, trace.num_requests, self._path)

    def trace(self) -> RoutingTrace:
        """What was recorded so far, requests in order of arrival."""
        rows: dict[int, dict[int, tuple[int, NDArray[np.unsignedinteger]]]] = defaultdict(dict)
        for batch, ids in self._steps:
            positions, tokens = batch.sequences.positions.tolist(), batch.token_ids.tolist()
            for i, request in enumerate(batch.requests):
                rows[request][positions[i]] = (tokens[i], ids[i])
        order = sorted(rows)
        of_request = [[rows[request][position] for position in sorted(rows[request])] for request in order]
        shape = (0, len(self._moe.layers), self._moe.num_active)
        choices = [ids for request in of_request for _, ids in request]
        lengths = [len(request) for request in of_request]
        return RoutingTrace(
            ids=np.stack(choices) if choices else np.zeros(shape, dtype=self._dtype),
            seq_off=np.cumsum([0, *lengths], dtype=np.int64),
            num_prompt=np.asarray(
                [sum(p < self._num_prompt.get(request, 0) for p in rows[request]) for request in order], dtype=np.int64
            ),
            num_experts=self._moe.num_experts,
            layers=self._moe.layers,
            domains=("",) * len(order),
            token_ids=np.asarray([token for request in of_request for token, _ in request], dtype=np.int64),
        )
