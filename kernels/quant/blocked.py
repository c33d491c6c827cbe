"""How a matrix lies for the CPU kernels: blocks of 16 output rows, pieces of 64 inputs, spans of 256.

The layout is described at the top of kernels/cpu/src/product.inl; this is its other half, in torch, so that packing and
reading back need no compiler. Rows are padded to 16 and inputs to 64.

A span's inputs share a scale. int8: weight = (byte - 128) * scale. int4: byte = nibble * step + base, with a step and a
base for each group of 32, so that an int4 matrix expands to an int8 one exactly (two levels, as in GGUF's k-quants).
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.cpu.library import FORMATS, is_built, load_library

ROWS = 16  # outputs in one block
PIECE = 64  # inputs in one piece
GROUP_SIZE = 32  # inputs that share a step and a base
SPAN = 256  # inputs that share a scale
PIECE_NBYTES = {"float32": 4096, "bf16": 2048, "int8": 1024, "int4": 576}
QUANTISED = ("int8", "int4")
_GROUPS_AT_ONCE = 8192  # quantising passes over its numbers many times: what it takes at once stays in the cache


def packed_nbytes(format: str, num_outputs: int, num_inputs: int) -> int:
    """Bytes of a packed [num_outputs, num_inputs] matrix."""
    return -(-num_outputs // ROWS) * _block_nbytes(format, num_inputs)


def pack_matrix(format: str, weight: Tensor) -> Tensor:
    """weight [N, K] float -> uint8 [blocks, block bytes], natively where that was built: the same bits, much faster."""
    if format not in QUANTISED or not is_built():
        return pack_in_torch(format, weight)
    weight = weight.float().contiguous()
    num_outputs, num_inputs = weight.shape
    packed = torch.empty(-(-num_outputs // ROWS), _block_nbytes(format, num_inputs), dtype=torch.uint8)
    num_threads = len(os.sched_getaffinity(0))
    load_library().foregate_pack(
        FORMATS[format], weight.data_ptr(), num_outputs, num_inputs, packed.data_ptr(), num_threads
    )
    return packed


def pack_in_torch(format: str, weight: Tensor) -> Tensor:
    """What `pack_matrix` does, without a compiler."""
    num_outputs, num_inputs = weight.shape
    padded = F.pad(weight.float(), (0, -num_inputs % PIECE, 0, -num_outputs % ROWS))
    blocks = padded.view(-1, ROWS, padded.shape[1])  # [blocks, 16, K]
    if format == "float32":
        return _as_bytes(blocks.transpose(1, 2))
    if format == "bf16":
        return _as_bytes(blocks.to(torch.bfloat16).unflatten(-1, (-1, 2)).transpose(1, 2))
    scales = _scales(blocks)  # [blocks, 16, spans]
    relative = _in_steps_of(scales, blocks)  # [blocks, 16, K], -127..127
    pieces = relative.unflatten(-1, (-1, PIECE)).transpose(1, 2)  # [blocks, pieces, 16, 64]
    if format == "int8":
        q = pieces.round().add_(128).to(torch.uint8)
        parts = [_as_bytes(q.unflatten(-1, (-1, 4)).transpose(2, 3))]
    else:
        groups = pieces.unflatten(-1, (2, GROUP_SIZE))  # [blocks, pieces, 16, 2, 32]
        in_cache = groups.reshape(-1, GROUP_SIZE).split(_GROUPS_AT_ONCE)
        found = (torch.cat(part) for part in zip(*map(_quantise_groups, in_cache), strict=True))
        q, steps, bases = (part.view(groups.shape[:4] + part.shape[1:]) for part in found)
        halves = q.unflatten(-1, (4, 2, 4)).permute(0, 1, 3, 4, 5, 2, 6)  # [blocks, pieces, 2, 4, 2 halves, 16, 4]
        nibbles = halves[:, :, :, :, 0] | (halves[:, :, :, :, 1] << 4)
        piece_parts = (nibbles.flatten(2), steps.transpose(2, 3).flatten(2), bases.flatten(2))
        parts = [torch.cat(piece_parts, dim=-1).flatten(1)]
    packed = torch.cat((*parts, _as_bytes(scales.transpose(1, 2))), dim=-1)
    return F.pad(packed, (0, _block_nbytes(format, num_inputs) - packed.shape[1]))


def unpack_matrix(format: str, packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The inverse of `pack_matrix`, float32 [N, K]; `packed` is uint8 of any shape."""
    num_pieces = -(-num_inputs // PIECE)
    blocks = packed.reshape(-1, _block_nbytes(format, num_inputs))
    num_blocks, pieces_nbytes = len(blocks), num_pieces * PIECE_NBYTES[format]
    stored = blocks[:, :pieces_nbytes].contiguous().view(num_blocks, num_pieces, -1)
    if format == "float32":
        weight = stored.view(torch.float32).unflatten(-1, (PIECE, ROWS)).transpose(2, 3)
    elif format == "bf16":
        weight = stored.view(torch.bfloat16).unflatten(-1, (PIECE // 2, ROWS, 2)).transpose(2, 3).flatten(-2).float()
    else:
        if format == "int8":
            q = stored.unflatten(-1, (16, ROWS, 4)).transpose(2, 3).flatten(-2).int()
        else:
            nibbles = stored[..., :512].unflatten(-1, (2, 4, ROWS, 4))
            halves = torch.stack((nibbles & 15, nibbles >> 4), dim=4)  # [blocks, pieces, 2, 4, 2 halves, 16, 4]
            u = halves.permute(0, 1, 5, 2, 3, 4, 6).flatten(-3).int()  # [blocks, pieces, 16, 2, 32]
            steps = stored[..., 512:544].unflatten(-1, (2, ROWS)).transpose(2, 3).int()
            bases = stored[..., 544:].unflatten(-1, (ROWS, 2)).int()
            q = (u * steps.unsqueeze(-1) + bases.unsqueeze(-1)).flatten(-2)
        num_spans = -(-num_pieces * PIECE // SPAN)
        scales = blocks[:, pieces_nbytes : pieces_nbytes + num_spans * 2 * ROWS].contiguous().view(torch.bfloat16)
        by_piece = scales.float().view(num_blocks, num_spans, ROWS).repeat_interleave(SPAN // PIECE, dim=1)
        weight = (q - 128).float() * by_piece[:, :num_pieces].unsqueeze(-1)
    flat: Tensor = weight.transpose(1, 2).flatten(2).flatten(0, 1)
    return flat[:num_outputs, :num_inputs]


def _block_nbytes(format: str, num_inputs: int) -> int:
    num_pieces = -(-num_inputs // PIECE)
    num_spans = -(-num_pieces * PIECE // SPAN) if format in QUANTISED else 0
    nbytes = num_pieces * PIECE_NBYTES[format] + num_spans * 2 * ROWS
    return -(-nbytes // 64) * 64


def _scales(blocks: Tensor) -> Tensor:
    """blocks [..., K] -> bf16 [..., spans]: a 127th of each span's largest magnitude, rounded up."""
    spans = F.pad(blocks, (0, -blocks.shape[-1] % SPAN)).unflatten(-1, (-1, SPAN))
    wanted = spans.abs().amax(-1) / 127.0
    scales = wanted.to(torch.bfloat16)
    above: Tensor = (scales.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(scales.float() < wanted, above, scales)


def _in_steps_of(scales: Tensor, blocks: Tensor) -> Tensor:
    """blocks [..., K] divided by their spans' scales; 0 where the scale is."""
    factors = torch.where(scales > 0, 1.0 / scales.float(), 0.0).repeat_interleave(SPAN, dim=-1)
    return (blocks * factors[..., : blocks.shape[-1]]).clamp_(-127.0, 127.0)


def _quantise_groups(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """groups [n, 32] in -127..127 -> nibbles [n, 32], steps [n], bases [n], all uint8.

    nibble * step + base - 128 is near the value, and its first two terms never pass 255. Of a few pairs of step and
    base, those with the smallest squared error: a step that cuts off the ends is often better than one that does not.
    """
    groups = groups.t().contiguous()  # so that one group is a lane, and its errors are added one after the other
    low, high = groups.amin(0), groups.amax(0)
    full = ((high - low) / 15.0).ceil_().clamp_(1.0, 17.0)
    best_error = torch.full_like(low, torch.inf)
    best_step, best_base = torch.ones_like(low), torch.full_like(low, 128.0)
    for smaller in (0, 1, 2):
        step = (full - smaller).clamp_(min=1.0)
        slack = (high - low) - 15.0 * step  # what does not fit between the ends, or, negative, what is left over
        for share in (0.5,) if smaller == 0 else (0.5, 0.25, 0.75):
            base = (low + slack * share + 128.0).round_().clamp_(min=0.0).minimum(255.0 - 15.0 * step)
            offset = base - 128.0
            u = _nibbles(groups, step, offset)
            error = torch.zeros_like(low)
            for squares in u.mul_(step).add_(offset).sub_(groups).square_():
                error += squares
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_step = torch.where(better, step, best_step)
            best_base = torch.where(better, base, best_base)
    nibbles = _nibbles(groups, best_step, best_base - 128.0)
    return nibbles.t().to(torch.uint8), best_step.to(torch.uint8), best_base.to(torch.uint8)


def _nibbles(groups: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    return (groups - offset).mul_(1.0 / step).round_().clamp_(0.0, 15.0)


def _as_bytes(x: Tensor) -> Tensor:
    """[blocks, ...] -> uint8 [blocks, bytes]."""
    return x.contiguous().flatten(1).view(torch.uint8)
