"""From the layout at rest to plain rows: for what is not ours (a library's product, a look at the weights).

Our own kernels read the layout at rest; this is not on the way of a request.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import launch
from kernels.gpu.matrix import PackedMatrix
from kernels.gpu.numbers import to_float, to_float_or_bf16
from kernels.gpu.tiles import STEP, load_scales, load_weights

_OUTPUTS = 64


@triton.jit
def _repack_kernel(
    weight,
    out,
    num_outputs,
    num_inputs,
    num_blocks,
    num_pieces,
    block_nbytes,
    FORMAT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = OUTPUTS // 16
    step = tl.program_id(1)
    blocks = tl.minimum(tl.program_id(0) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS), num_blocks - 1)
    tile = load_weights(weight, blocks, step, num_pieces, block_nbytes, FORMAT, NUM_BLOCKS)
    if FORMAT == "int8" or FORMAT == "int4":
        scales = load_scales(weight, blocks, step, num_pieces, block_nbytes, FORMAT, NUM_BLOCKS)
        plain = tile.to(tl.float32) * scales[:, None]
    else:
        plain = to_float(tile)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = step * STEP + tl.arange(0, STEP)
    to = out + n.to(tl.int64)[:, None] * num_inputs + k[None, :]
    tl.store(to, to_float_or_bf16(plain, out), mask=(n < num_outputs)[:, None] & (k < num_inputs)[None, :])


def repack(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """The matrix as plain rows [N, K] of float32 or bfloat16; see `quant.blocked.unpack_matrix`."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"cannot repack as {dtype}; known: float32, bfloat16")
    shape = matrix.shape
    out = torch.empty(shape.num_outputs, shape.num_inputs, dtype=dtype, device=matrix.data.device)
    step = STEP[shape.format]
    launch(
        _repack_kernel,
        (-(-shape.num_outputs // _OUTPUTS), -(-shape.num_inputs // step)),
        matrix.data,
        out,
        shape.num_outputs,
        shape.num_inputs,
        shape.num_blocks,
        shape.num_pieces,
        shape.block_nbytes,
        options={"num_warps": 4, "num_stages": 1},
        FORMAT=shape.format,
        OUTPUTS=_OUTPUTS,
        STEP=step,
    )
    return out
