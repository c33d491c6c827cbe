"""A matrix as it lies at rest, on the GPU: the same bytes as on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.quant.blocked import PIECE, ROWS, pack_matrix, packed_nbytes


@dataclass(frozen=True, slots=True)
class PackedShape:
    """Sizes of a packed [num_outputs, num_inputs] matrix."""

    format: str
    num_outputs: int
    num_inputs: int

    @property
    def num_blocks(self) -> int:
        return -(-self.num_outputs // ROWS)

    @property
    def num_pieces(self) -> int:
        return -(-self.num_inputs // PIECE)

    @property
    def block_nbytes(self) -> int:
        return packed_nbytes(self.format, ROWS, self.num_inputs)

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_nbytes


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """`data` is uint8 of `shape.nbytes`, aligned to 64 bytes."""

    shape: PackedShape
    data: Tensor

    def __post_init__(self) -> None:
        if self.data.dtype != torch.uint8 or not self.data.is_contiguous() or self.data.numel() != self.shape.nbytes:
            raise ValueError(f"{self.shape} needs {self.shape.nbytes} contiguous bytes, got {tuple(self.data.shape)}")
        if self.data.data_ptr() % 64:
            raise ValueError("a packed matrix must be aligned to 64 bytes")

    @classmethod
    def pack(cls, weight: Tensor, format: str, device: torch.device) -> PackedMatrix:
        """From a float weight [N, K]."""
        shape = PackedShape(format, *weight.shape)
        return cls(shape, _aligned(pack_matrix(format, weight.cpu()).flatten().to(device)))


def _aligned(data: Tensor) -> Tensor:
    """`data`, or a copy of it that begins at a multiple of 64; CUDA's own always do."""
    if data.data_ptr() % 64 == 0:
        return data
    memory = torch.empty(data.numel() + 64, dtype=torch.uint8, device=data.device)
    start = -memory.data_ptr() % 64
    aligned = memory[start : start + data.numel()]
    aligned.copy_(data)
    return aligned
