"""A dense SwiGLU feed-forward layer: the FFN of layers without experts, or an always-on shared expert."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.batch import Batch
from kernels.backend import Backend, Linear


@dataclass(slots=True)
class DenseMLP:
    """gate_up [2 I, H] with gate above up, down [H, I]."""

    backend: Backend
    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor, batch: Batch, residual: Tensor) -> None:
        """x [T, H], normed; adds to residual [T, H]."""
        self.down(self.backend.swiglu(self.gate_up(x)), add_to=residual)
