"""The MoE layer: route, lease the experts, compute each as it is there, combine in routing order."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from engine.batch import Batch
from engine.expert_group import ExpertGroup
from engine.layers.cpu_experts import CpuExperts
from engine.layers.foresight import RoutingObserver
from kernels.backend import Backend, MlpKernel, Records, RouterKernel, Routing
from kernels.quant.layout import RecordLayout


class ExpertFailure(RuntimeError):
    """An expert could not be read, so these rows of the batch cannot be computed; the step is void."""

    def __init__(self, rows: list[int], cause: ExpertReadError) -> None:
        super().__init__(str(cause))
        self.rows = rows


class ExpertArena:
    """The experts' side of a model: the cache, and the records in its slots."""

    def __init__(
        self,
        cache: ExpertCache,
        arena: Tensor,
        num_slots: int,
        layout: RecordLayout,
        group: ExpertGroup | None = None,
    ) -> None:
        """`arena`, uint8, are the bytes of all slots, one after the other. `group`: has the other experts."""
        self.cache = cache
        self.group = group
        self.on_cpu: CpuExperts | None = None  # computes some of the missing ones
        self.records = Records(layout, list(arena.view(num_slots, -1)))
        self._memory = self._outputs = torch.empty(0, layout.hidden_size, device=arena.device)

    def outputs(self, num_rows: int) -> Tensor:
        """Memory for products [num_rows, H], the same for every layer: new pages each time would be slow."""
        if num_rows != len(self._outputs):
            if num_rows > len(self._memory):
                self._memory = torch.empty(num_rows, self.records.layout.hidden_size, device=self._memory.device)
            self._outputs = self._memory[:num_rows]
        return self._outputs

    def close(self) -> None:
        """Finish what is under way and end the threads."""
        if self.on_cpu is not None:
            self.on_cpu.close()
        self.cache.close()


class Router(Protocol):
    """Norm, and choice of experts, of one layer."""

    def __call__(self, residual: Tensor, batch: Batch) -> tuple[Tensor, Routing]:
        """residual [T, H] -> its norm x [T, H], and where each row goes; both hold until a router is called again."""
        ...


@dataclass(slots=True)
class LayerwiseRouter:
    """Routes by the layer's own input."""

    kernel: RouterKernel

    def __call__(self, residual: Tensor, batch: Batch) -> tuple[Tensor, Routing]:
        return self.kernel(residual)


@dataclass(slots=True)
class PregatedRouter:
    """Routes by what the pre-gate made of the tokens before the forward pass began."""

    index: int  # of the layers with experts
    backend: Backend
    norm: Tensor  # float32 [H]
    eps: float

    def __call__(self, residual: Tensor, batch: Batch) -> tuple[Tensor, Routing]:
        assert batch.routings is not None
        return self.backend.rms_norm(residual, self.norm, self.eps), batch.routings[self.index]


class MoELayer:
    """Experts of one layer, and a shared one where the family has it.

    The output does not depend on where the experts were, in which order they came, or in how many waves: each
    (token, expert) product is kept apart until all are added in routing order.
    """

    def __init__(
        self,
        index: int,
        keys: Sequence[ExpertKey],
        backend: Backend,
        router: Router,
        experts: ExpertArena,
        shared: MlpKernel | None,
        observer: RoutingObserver | None,
    ) -> None:
        """`index`: of the layers with experts; `keys` are its experts'; `shared` takes rows that are normed already."""
        self._index = index
        self._keys = keys
        self._observer = observer
        self._backend = backend
        self._router = router
        self._experts = experts
        self._shared = shared

    def __call__(self, residual: Tensor, batch: Batch) -> None:
        """Adds to residual [T, H]; raises `ExpertFailure`, and the step is then void."""
        x, routing = self._router(residual, batch)
        seen = routing if routing.ids.device.type == "cpu" else replace(routing, ids=routing.ids.cpu())
        keys = [self._keys[expert] for expert in routing.experts]
        outputs = self._experts.outputs(routing.num_positions)
        backend, records, cache = self._backend, self._experts.records, self._experts.cache
        if not cache.holds_all:
            cache.observe(keys[0].layer, batch.requests, seen.ids.tolist(), is_prefill=batch.phase == "prefill")
        elsewhere: Future[None] | None = None
        if self._experts.on_cpu is not None and (chosen := self._experts.on_cpu.choose(routing, keys)):
            elsewhere = self._experts.on_cpu.begin(x, routing, chosen, outputs)
            keys = [key for key in keys if key not in chosen]
        group = self._experts.group
        if group is not None:
            keys = [key for key in keys if group.owns(self._index, key.expert)]
        at_once = False
        failed: ExpertReadError | None = None
        try:
            with cache.acquire(keys, batch.phase) as lease:
                if self._observer is not None:
                    self._observer.layer_begins(self._index, x, seen, batch)
                for found in lease.batches():
                    ready = [(key.expert, slot) for key, slot in found]
                    at_once = len(ready) == len(routing.experts) and group is None
                    backend.expert_mlp(x, routing, records, ready, outputs, add_to=residual if at_once else None)
        except ExpertReadError as error:
            if group is None:
                raise ExpertFailure(routing.tokens_of(error.key.expert), error) from error
            failed = error
        finally:
            if elsewhere is not None:
                elsewhere.result()
        if group is not None:
            unread = group.exchange(self._index, routing, outputs, None if failed is None else failed.key.expert)
            if unread is not None:
                raise ExpertFailure(routing.tokens_of(unread), failed or _elsewhere(self._keys[unread]))
        if not at_once:
            backend.combine(outputs, routing.weights, add_to=residual)
        if self._shared is not None:
            self._shared(x, residual)


def _elsewhere(key: ExpertKey) -> ExpertReadError:
    return ExpertReadError(key, "cannot be read by the process that has it; its log says why")
