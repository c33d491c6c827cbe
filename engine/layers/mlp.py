"""A dense SwiGLU feed-forward layer: the FFN of layers without experts, or an always-on shared expert."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.batch import Batch
from kernels import reference


@dataclass(slots=True)
class DenseMLP:
    """gate and up [I, H], down [H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, H] -> [T, H]."""
        return reference.swiglu(x, self.gate, self.up, self.down)
