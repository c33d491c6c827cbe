"""When each part of each step of a running engine began and ended: what costs are fitted to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache.expert_cache import ExpertCache
from cache.replay import Step
from cache.trace import RoutingTrace
from engine.batch import Batch
from kernels.backend import Backend, Records, Routing


@dataclass(slots=True)
class ExpertCall:
    """One call of the expert kernel."""

    experts: list[int]
    began: float
    ended: float
    is_reading: bool  # records were still on their way when it ended


@dataclass(slots=True)
class LayerTimes:
    """One layer call. `num_in_flight`: records on their way once it was routed, its misses among them."""

    routed: float
    ids: NDArray[np.int32]  # [T, k]
    num_in_flight: int
    calls: list[ExpertCall] = field(default_factory=list)
    combine_s: float | None = None
    ended: float = 0.0  # its last kernel

    @property
    def num_experts(self) -> int:
        return len(np.unique(self.ids))

    @property
    def is_immediate(self) -> bool:
        """Whether its first kernel call waited for nothing; certain only where nothing is foretold."""
        return len(self.calls[0].experts) + self.num_in_flight >= self.num_experts

    @property
    def waited_s(self) -> float:
        """Between its kernel calls, and before the first if that had to wait."""
        kernels = sum(call.ended - call.began for call in self.calls) + (self.combine_s or 0.0)
        return self.ended - kernels - (self.calls[0].began if self.is_immediate else self.routed)


@dataclass(slots=True)
class StepTimes:
    """One step; `told` is when its tokens were embedded. Who calls `Engine.step` fills in when it began and ended."""

    told: float
    batch: Batch
    num_attended: int
    layers: list[LayerTimes] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    @property
    def num_rows(self) -> int:
        return len(self.batch.requests)

    @property
    def is_prefill(self) -> bool:
        return self.batch.phase == "prefill"


class StepClock:
    """Observes an engine whose backend is `timed`. `cache` is set once there is one."""

    def __init__(self) -> None:
        self.steps: list[StepTimes] = []
        self.cache: ExpertCache | None = None

    def timed(self, backend: Backend) -> Backend:
        """The same backend, told of here."""
        return cast(Backend, _TimedExperts(backend, self))

    def step_begins(self, batch: Batch) -> None:
        now = time.perf_counter()
        num_attended = int(batch.sequences.positions.sum()) + len(batch.requests)
        self.steps.append(StepTimes(now, batch, num_attended))

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        ids = routing.ids.numpy().copy()
        self.steps[-1].layers.append(LayerTimes(time.perf_counter(), ids, self.num_in_flight))

    def step_ends(self) -> None:
        """Nothing."""

    def request_ends(self, number: int) -> None:
        """Nothing."""

    @property
    def num_in_flight(self) -> int:
        """Records on their way."""
        cache = self.cache
        return 0 if cache is None else cache.transfer.in_flight_nbytes // cache.record_nbytes


class _TimedExperts:
    def __init__(self, backend: Backend, clock: StepClock) -> None:
        self._backend = backend
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def expert_mlp(
        self,
        x: Tensor,
        routing: Routing,
        records: Records,
        ready: Sequence[tuple[int, int]],
        outputs: Tensor,
        add_to: Tensor | None = None,
    ) -> None:
        began = time.perf_counter()
        self._backend.expert_mlp(x, routing, records, ready, outputs, add_to=add_to)
        ended = time.perf_counter()
        layer = self._clock.steps[-1].layers[-1]
        layer.calls.append(ExpertCall([expert for expert, _ in ready], began, ended, self._clock.num_in_flight > 0))
        layer.ended = ended

    def combine(self, outputs: Tensor, weights: Tensor, add_to: Tensor) -> None:
        began = time.perf_counter()
        self._backend.combine(outputs, weights, add_to)
        layer = self._clock.steps[-1].layers[-1]
        layer.ended = time.perf_counter()
        layer.combine_s = layer.ended - began


def replayed_steps(times: Sequence[StepTimes], trace: RoutingTrace) -> list[Step]:
    """The engine's own steps as rows of the trace that it recorded, of requests that came in this order."""
    steps = []
    offsets = trace.seq_off.tolist()
    for step in times:
        requests = step.batch.requests
        positions = step.batch.sequences.positions.tolist()
        rows = [offsets[request] + position for request, position in zip(requests, positions, strict=True)]
        ended = [request for request, row in zip(requests, rows, strict=True) if row + 1 == offsets[request + 1]]
        steps.append(Step(rows, list(requests), step.is_prefill, ended))
    return steps
