"""The memory that KV blocks live in. Who owns which block is `BlockManager`'s affair."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.spec import ModelSpec

BLOCK_SIZE = 16  # tokens; the kernels' layout depends on it


def kv_block_nbytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * spec.num_kv_layers * BLOCK_SIZE * spec.num_kv_heads * spec.head_dim * dtype.itemsize


class KVCache:
    """For each layer keys [blocks, kv_heads, head_dim, 16] and values [blocks, kv_heads, 16, head_dim]; pre-gate last.

    The 16 tokens of a block lie side by side in the keys, so that scores need no sums across lanes. The system
    commits pages when they are first written.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        heads, dim = spec.num_kv_heads, spec.head_dim
        self._layers = [
            (
                torch.zeros(num_blocks, heads, dim, BLOCK_SIZE, dtype=dtype, device=device),
                torch.zeros(num_blocks, heads, BLOCK_SIZE, dim, dtype=dtype, device=device),
            )
            for _ in range(spec.num_kv_layers)
        ]

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._layers[layer]
