"""The MoE layer: route, lease the experts, compute each as it is there, combine in routing order."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError
from engine.batch import Batch
from engine.layers.mlp import DenseMLP
from kernels import reference
from kernels.moe import expert_mlp, group_by_expert
from kernels.quant.layout import RecordLayout
from kernels.quant.record import QuantFormat

Route = Callable[[Tensor], tuple[Tensor, Tensor]]  # logits [T, E] -> ids [T, k], weights [T, k]


class ExpertFailure(RuntimeError):
    """An expert could not be read, so these rows of the batch cannot be computed; the step is void."""

    def __init__(self, rows: list[int], cause: ExpertReadError) -> None:
        super().__init__(str(cause))
        self.rows = rows


class ExpertArena:
    """The experts' side of a model: the cache, its arena as a tensor, and what its bytes mean."""

    def __init__(self, cache: ExpertCache, arena: Tensor, quant_format: QuantFormat, layout: RecordLayout) -> None:
        """arena uint8 [slots, slot_nbytes]."""
        self.cache = cache
        self.arena = arena
        self.quant_format = quant_format
        self.layout = layout


class MoELayer:
    """Experts of one layer, and a shared one where the family has it.

    The output does not depend on where the experts were, in which order they came, or in how many waves: each
    (token, expert) product is kept apart until all are added in routing order.
    """

    def __init__(
        self,
        layer: int,
        router: Tensor,
        router_bias: Tensor | None,
        route: Route,
        experts: ExpertArena,
        shared: DenseMLP | None,
    ) -> None:
        self._layer = layer
        self._router = router  # [E, H]
        self._router_bias = router_bias
        self._route = route
        self._experts = experts
        self._shared = shared

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] -> [T, H]; raises `ExpertFailure`."""
        router_input = x.to(self._router.dtype)
        topk_ids, topk_weights = self._route(F.linear(router_input, self._router, self._router_bias))
        positions = group_by_expert(topk_ids)
        keys = [ExpertKey(self._layer, expert) for expert in positions]
        outputs = x.new_empty(*topk_ids.shape, x.shape[1])  # [T, k, H]
        experts = self._experts
        try:
            with experts.cache.acquire(keys, batch.phase) as lease:
                for ready in lease.batches():
                    records = [(key.expert, experts.arena[slot]) for key, slot in ready]
                    expert_mlp(x, positions, records, experts.quant_format, experts.layout, outputs)
        except ExpertReadError as error:
            rows = (positions[error.key.expert] // topk_ids.shape[1]).tolist()
            raise ExpertFailure(rows, error) from error
        routed = reference.combine(outputs, topk_weights)
        return routed if self._shared is None else routed + self._shared(x, batch)


def make_arena(buffer: memoryview, num_slots: int) -> Tensor:
    """A slot pool's bytes as uint8 [slots, slot_nbytes], without a copy."""
    return torch.frombuffer(buffer, dtype=torch.uint8).view(num_slots, -1)
