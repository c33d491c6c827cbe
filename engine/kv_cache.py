"""The memory that KV blocks live in. Who owns which block is `BlockManager`'s affair."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.spec import ModelSpec


def kv_block_nbytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * spec.num_layers * block_size * spec.num_kv_heads * spec.head_dim * dtype.itemsize


class KVCache:
    """For each layer keys and values [2, num_blocks * block_size, kv_heads, head_dim]; a token's slot is
    block_id * block_size + position % block_size. The system commits pages when they are first written.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        shape = (2, num_blocks * block_size, spec.num_kv_heads, spec.head_dim)
        self._layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]

    def __getitem__(self, layer: int) -> Tensor:
        return self._layers[layer]
