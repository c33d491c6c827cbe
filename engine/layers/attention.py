"""Self-attention of one decoder layer over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.batch import Batch
from kernels.backend import AttentionShape, Backend, Linear


@dataclass(slots=True)
class Attention:
    """qkv [(heads + 2 kv_heads) * D, H] with q, k, v below one another; output [H, heads * D]."""

    backend: Backend
    shape: AttentionShape
    qkv: Linear
    output: Linear

    def __call__(self, x: Tensor, batch: Batch, kv: tuple[Tensor, Tensor], residual: Tensor) -> None:
        """x [T, H], normed; adds attention's output to residual [T, H] and writes the new tokens' keys and values."""
        attended = self.backend.attend(self.shape, self.qkv(x), *kv, batch.sequences)
        self.output(attended, add_to=residual)
