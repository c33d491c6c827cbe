"""Dense layers: rows times a packed matrix of any format."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import Tile
from kernels.gpu.launch import checked, launch
from kernels.gpu.matrix import PackedMatrix
from kernels.gpu.rounding import RoundedRows
from kernels.gpu.tiles import multiply, multiply_low_bytes


@triton.jit
def _linear_kernel(
    weight,
    x,
    x_scales,
    low,
    is_low,
    bias,
    out,
    num_rows,
    num_outputs,
    num_blocks,
    num_pieces,
    block_nbytes,
    x_stride,
    FORMAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = OUTPUTS // 16
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    blocks = tl.minimum(tl.program_id(1) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS), num_blocks - 1)
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    acc = multiply(
        weight, blocks, num_pieces, block_nbytes, x, x_scales, rows, there, x_stride, acc, FORMAT, NUM_BLOCKS
    )
    if FORMAT == "int8" or FORMAT == "int4":
        acc = multiply_low_bytes(
            weight,
            blocks,
            num_pieces,
            block_nbytes,
            low,
            is_low,
            x_scales,
            rows,
            there,
            x_stride,
            acc,
            FORMAT,
            NUM_BLOCKS,
        )
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < num_outputs, other=0.0)[:, None]
    to = out + rows[None, :] * num_outputs + n[:, None]
    wanted = there[None, :] & (n < num_outputs)[:, None]
    if IS_ADDED:
        acc += tl.load(to, mask=wanted, other=0.0)
    tl.store(to, acc, mask=wanted)


def linear(
    x: RoundedRows, matrix: PackedMatrix, bias: Tensor | None, tile: Tile, add_to: Tensor | None = None
) -> Tensor:
    """x [n, K] rounded for the matrix' format -> float32 [n, N], added in place to `add_to` where that is given.

    See `reference.linear`. Raises `ValueError` for what does not fit.
    """
    shape = matrix.shape
    if (x.format, x.num_inputs) != (shape.format, shape.num_inputs):
        raise ValueError(f"{x.format} rows of {x.num_inputs} do not fit {shape}")
    if x.scales is not None and x.low is None:
        raise ValueError("rows of a dense layer must be rounded with is_dense")
    if bias is not None:
        checked(bias, torch.float32, shape.num_outputs)
    if add_to is None:
        out = torch.empty(x.num_rows, shape.num_outputs, device=x.values.device)
    else:
        out = checked(add_to, torch.float32, x.num_rows, shape.num_outputs)
    launch(
        _linear_kernel,
        (-(-x.num_rows // tile.rows), -(-shape.num_outputs // tile.outputs)),
        matrix.data,
        x.values,
        x.values if x.scales is None else x.scales,
        x.values if x.low is None else x.low,
        x.values if x.is_low is None else x.is_low,
        out if bias is None else bias,
        out,
        x.num_rows,
        shape.num_outputs,
        shape.num_blocks,
        shape.num_pieces,
        shape.block_nbytes,
        x.values.shape[1],
        options=tile.options,
        FORMAT=shape.format,
        HAS_BIAS=bias is not None,
        IS_ADDED=add_to is not None,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
    )
    return out
