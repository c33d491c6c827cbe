"""The MoE layer: route, lease the experts, compute each as it is there, combine in routing order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from engine.batch import Batch
from engine.layers.mlp import DenseMLP
from engine.models.spec import Routing
from kernels.backend import Backend, Linear
from kernels.quant.layout import RecordLayout


class ExpertFailure(RuntimeError):
    """An expert could not be read, so these rows of the batch cannot be computed; the step is void."""

    def __init__(self, rows: list[int], cause: ExpertReadError) -> None:
        super().__init__(str(cause))
        self.rows = rows


class ExpertArena:
    """The experts' side of a model: the cache, its slots as tensors, and what their bytes mean."""

    def __init__(self, cache: ExpertCache, arena: memoryview, num_slots: int, layout: RecordLayout) -> None:
        """`arena` are the bytes of all slots, one after the other."""
        self.cache = cache
        self.layout = layout
        self.records = list(torch.frombuffer(arena, dtype=torch.uint8).view(num_slots, -1))


@dataclass(slots=True)
class MoELayer:
    """Experts of one layer, and a shared one where the family has it.

    The output does not depend on where the experts were, in which order they came, or in how many waves: each
    (token, expert) product is kept apart until all are added in routing order.
    """

    layer: int
    backend: Backend
    router: Linear  # float32 [E, H]
    routing: Routing
    num_active: int
    experts: ExpertArena
    shared: DenseMLP | None

    def __call__(self, x: Tensor, batch: Batch, residual: Tensor) -> None:
        """x [T, H], normed; adds to residual [T, H]; raises `ExpertFailure`, and the step is then void."""
        routing = self.backend.route(self.router(x), self.num_active, self.routing)
        keys = [ExpertKey(self.layer, expert) for expert in routing.experts]
        outputs = x.new_empty(x.shape[0] * self.num_active, x.shape[1])
        experts = self.experts
        try:
            with experts.cache.acquire(keys, batch.phase) as lease:
                for ready in lease.batches():
                    records = [(key.expert, experts.records[slot]) for key, slot in ready]
                    self.backend.expert_mlp(x, routing, records, experts.layout, outputs)
        except ExpertReadError as error:
            raise ExpertFailure(routing.tokens_of(error.key.expert), error) from error
        self.backend.combine(outputs, routing.weights, add_to=residual)
        if self.shared is not None:
            self.shared(x, batch, residual)
