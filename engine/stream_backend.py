"""CPU kernels behind a simulated device's compute stream: calls return at once, arithmetic runs later, as on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from cache.device.device import Device, Region
from engine.batch import Batch
from kernels.backend import (
    AttentionKernel,
    AttentionShape,
    Backend,
    Linear,
    MlpKernel,
    Records,
    RouterKernel,
    Routing,
    Sequences,
)

_T = TypeVar("_T")


class StreamBackend:
    """See `kernels.backend.Backend`. Waits only where the host looks at a result: routing, and logits.

    Experts' products say which slots they read, so that the device finds what nothing orders; they take and give back
    memory of the device for what lies between an expert's two halves, as a GPU's kernels do.
    """

    name: str
    device: torch.device

    def __init__(self, inner: Backend, device: Device, region: Callable[[int], Region]) -> None:
        """`region`: where a slot's record lies."""
        self.name = f"{inner.name} on {device.name}"
        self.device = inner.device
        self.one_at_a_time = threading.Lock()  # of the kernels' callers: they share one thread pool
        self._inner = inner
        self._device = device
        self._region = region

    def make_linear(self, weight: Tensor, bias: Tensor | None, format: str) -> Linear:
        return _StreamLinear(self, self._inner.make_linear(weight, bias, format))

    def make_attention(self, shape: AttentionShape, norm: Tensor, qkv: Linear, output: Linear) -> AttentionKernel:
        kernel = self._inner.make_attention(shape, norm, _inner(qkv), _inner(output))

        def attention(residual: Tensor, keys: Tensor, values: Tensor, sequences: Sequences) -> None:
            self.put(lambda: kernel(residual, keys, values, sequences))

        return attention

    def make_router(self, norm: Tensor, eps: float, router: Linear, num_active: int, routing: str) -> RouterKernel:
        kernel = self._inner.make_router(norm, eps, _inner(router), num_active, routing)
        return lambda residual: self.result(lambda: kernel(residual))

    def make_mlp(self, norm: Tensor | None, eps: float, gate_up: Linear, down: Linear) -> MlpKernel:
        kernel = self._inner.make_mlp(norm, eps, _inner(gate_up), _inner(down))
        return lambda x, residual: self.put(lambda: kernel(x, residual))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        self.put(lambda: out.copy_(self._inner.rms_norm(x, weight, eps)))
        return out

    def expert_mlp(
        self,
        x: Tensor,
        routing: Routing,
        records: Records,
        ready: Sequence[tuple[int, int]],
        outputs: Tensor,
        add_to: Tensor | None = None,
    ) -> None:
        """Raises `cache.device.device.DeviceOutOfMemory`."""
        scratch = self._device.allocate(routing.num_positions * records.layout.intermediate_size * 4)
        regions = [self._region(slot) for _, slot in ready]
        self.put(lambda: self._inner.expert_mlp(x, routing, records, ready, outputs, add_to), regions)
        scratch.free()  # whoever gets it next is later in the same stream

    def combine(self, outputs: Tensor, weights: Tensor, add_to: Tensor) -> None:
        self.put(lambda: self._inner.combine(outputs, weights, add_to))

    def put(self, work: Callable[[], object], reads: Sequence[Region] = ()) -> None:
        """Into the compute stream."""

        def run() -> None:
            with torch.inference_mode(), self.one_at_a_time:
                work()

        self._device.compute.run(run, reads)

    def result(self, work: Callable[[], _T]) -> _T:
        """Of work in the compute stream, once it has run."""
        results: list[_T] = []
        self.put(lambda: results.append(work()))
        self._device.compute.synchronize()
        return results[0]


class _StreamLinear:
    def __init__(self, stream: StreamBackend, inner: Linear) -> None:
        self._stream = stream
        self.inner = inner

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        if add_to is None:
            return self._stream.result(lambda: self.inner(x))
        self._stream.put(lambda: self.inner(x, add_to))
        return add_to


class StepEnd:
    """See `engine.layers.foresight.RoutingObserver`: the last layer is computed only when its stream has run."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def step_begins(self, batch: Batch) -> None:
        """Nothing: what ran before the step was waited for, or the step was void."""

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        """Nothing: whoever routes has waited."""

    def step_ends(self) -> None:
        self._device.compute.synchronize()

    def request_ends(self, number: int) -> None:
        """Nothing."""


def _inner(linear: Linear) -> Linear:
    if not isinstance(linear, _StreamLinear):
        raise TypeError("the matrix was made by another backend")
    return linear.inner
