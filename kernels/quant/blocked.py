"""How a matrix lies for the CPU kernels: blocks of 16 output rows, pieces of 64 inputs, scales beside their weights.

The layout is described at the top of kernels/cpu/src/gemm.inl; this is its other half, in torch, so that packing and
reading back need no compiler. Rows are padded to 16 and inputs to 64 with weights that are exactly zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ROWS = 16  # outputs in one block
PIECE = 64  # inputs in one piece
GROUP_SIZE = 32  # inputs that share a scale
FLOAT16_MAX = 65504.0
PIECE_NBYTES = {"float32": 4096, "bf16": 2048, "int8": 1088, "int4": 576}


def packed_nbytes(format: str, num_outputs: int, num_inputs: int) -> int:
    """Bytes of a packed [num_outputs, num_inputs] matrix."""
    return -(-num_outputs // ROWS) * -(-num_inputs // PIECE) * PIECE_NBYTES[format]


def pack_matrix(format: str, weight: Tensor) -> Tensor:
    """weight [N, K] float -> uint8 [blocks, pieces, piece bytes]."""
    num_outputs, num_inputs = weight.shape
    padded = F.pad(weight.float(), (0, -num_inputs % PIECE, 0, -num_outputs % ROWS))
    blocks = padded.view(-1, ROWS, padded.shape[1] // PIECE, PIECE).transpose(1, 2)  # [blocks, pieces, 16, 64]
    if format == "float32":
        return _as_bytes(blocks.transpose(2, 3))
    if format == "bf16":
        pairs = blocks.to(torch.bfloat16).unflatten(-1, (-1, 2))  # [blocks, pieces, 16, 32, 2]
        return _as_bytes(pairs.transpose(2, 3))
    q, scales = _quantise(format, blocks.unflatten(-1, (2, GROUP_SIZE)))
    scale_bytes = _as_bytes(scales.transpose(2, 3))  # [blocks, pieces, 2 groups, 16] float16
    if format == "int8":
        words = q.unflatten(-1, (-1, 4)).permute(0, 1, 3, 4, 2, 5)  # [blocks, pieces, 2, 8, 16, 4]
        return torch.cat((_as_bytes(words), scale_bytes), dim=-1)
    halves = q.unflatten(-1, (4, 2, 4)).permute(0, 1, 3, 4, 5, 2, 6)  # [blocks, pieces, 2, 4, 2 halves, 16, 4]
    nibbles = halves[:, :, :, :, 0] | (halves[:, :, :, :, 1] << 4)
    return torch.cat((_as_bytes(nibbles), scale_bytes), dim=-1)


def unpack_matrix(format: str, packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The inverse of `pack_matrix`, float32 [N, K]; `packed` is uint8 of any shape."""
    num_pieces = -(-num_inputs // PIECE)
    pieces = packed.reshape(-1, num_pieces, PIECE_NBYTES[format])
    if format == "float32":
        blocks = pieces.view(torch.float32).unflatten(-1, (PIECE, ROWS)).transpose(2, 3)
    elif format == "bf16":
        blocks = pieces.view(torch.bfloat16).unflatten(-1, (PIECE // 2, ROWS, 2)).transpose(2, 3).flatten(-2).float()
    else:
        scales = pieces[..., -64:].contiguous().view(torch.float16).unflatten(-1, (2, ROWS)).transpose(2, 3)
        stored = pieces[..., :-64]
        if format == "int8":
            q = stored.unflatten(-1, (2, 8, ROWS, 4)).permute(0, 1, 4, 2, 3, 5).flatten(-2).float() - 128.0
        else:
            nibbles = stored.unflatten(-1, (2, 4, ROWS, 4))
            halves = torch.stack((nibbles & 15, nibbles >> 4), dim=4)  # [blocks, pieces, 2, 4, 2 halves, 16, 4]
            q = halves.permute(0, 1, 5, 2, 3, 4, 6).flatten(-3).float() - 8.0
        blocks = (q * scales.float().unsqueeze(-1)).flatten(-2)
    weight: Tensor = blocks.transpose(1, 2).flatten(2).flatten(0, 1)
    return weight[:num_outputs, :num_inputs]


def _quantise(format: str, groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups [..., 32] -> q uint8 [..., 32] (int8 + 128, int4 + 8), scales float16 [...].

    weight ~= (q - offset) * scale. int4's scale is signed so that the group's largest magnitude falls on -8, the
    longer end of the range (as in GGUF's Q4_0).
    """
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    offset, low, high = (8, -8, 7) if format == "int4" else (128, -127, 127)
    steps = extreme / -8.0 if format == "int4" else extreme.abs() / 127.0
    scales = steps.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
    divisor = scales.float().unsqueeze(-1)
    q = torch.where(divisor != 0, groups / divisor, 0.0).round_().clamp_(low, high).add_(offset)
    return q.to(torch.uint8), scales


def _as_bytes(x: Tensor) -> Tensor:
    """[blocks, pieces, ...] -> uint8 [blocks, pieces, bytes]."""
    return x.contiguous().flatten(2).view(torch.uint8)
