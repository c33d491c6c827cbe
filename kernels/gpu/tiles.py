"""Inside kernels: tiles of packed matrices, read where they lie, and their products with rows.

A matrix is in the layout of `kernels.quant.blocked`, the CPU's: what a 32-bit word of it holds, four int8 or two bf16
inputs of one output row, is what a register of a tensor core's operand holds, so there is nothing to lay out again.

A tile is [outputs, inputs] times [inputs, rows]: outputs are the tensor cores' long side and rows their short one. So a
variant for few rows and one for many use the same instruction, and each sum goes through the same inputs in the same
order: STEP inputs at a time, one step after the other, never split over programs. That is why a row's bits do not
depend on its company. Sums of integer formats are whole numbers within a span, hence exact however they are come by.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.numbers import dot, dot_of_bytes

STEP = {"float32": 64, "bf16": 64, "int8": 256, "int4": 256}  # inputs that are multiplied at a time; not tuned


@triton.jit
def load_weights(weight, blocks, step, num_pieces, block_nbytes, FORMAT: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """Step `step` of some blocks of 16 outputs -> [16 NUM_BLOCKS, STEP] int8, bf16 or float32.

    weight: uint8 pointer to the matrix; blocks [NUM_BLOCKS]: which. Pieces beyond the matrix are zeros.
    """
    OUTPUTS: tl.constexpr = NUM_BLOCKS * 16
    start = weight + (blocks.to(tl.int64) * block_nbytes)[:, None]
    if FORMAT == "float32":
        at = tl.arange(0, 1024)
        words = start.to(tl.pointer_type(tl.float32)) + (step * 1024 + at)[None, :]
        return tl.load(words).reshape(NUM_BLOCKS, 64, 16).permute(0, 2, 1).reshape(OUTPUTS, 64)
    elif FORMAT == "bf16":
        at = tl.arange(0, 1024)
        words = start.to(tl.pointer_type(tl.bfloat16)) + (step * 1024 + at)[None, :]
        return tl.load(words).reshape(NUM_BLOCKS, 32, 16, 2).permute(0, 2, 1, 3).reshape(OUTPUTS, 64)
    elif FORMAT == "int8":
        at = tl.arange(0, 4096)
        there = (step * 4 + at // 1024 < num_pieces)[None, :]
        q = tl.load(start + (step * 4096 + at)[None, :], mask=there, other=128)
        q = q.reshape(NUM_BLOCKS, 64, 16, 4).permute(0, 2, 1, 3).reshape(OUTPUTS, 256)
        return (q ^ 128).to(tl.int8, bitcast=True)
    else:
        pieces = step * 4 + tl.arange(0, 4)
        there = (pieces < num_pieces)[None, :, None]
        piece = start[:, :, None] + (pieces * 576)[None, :, None]
        at = tl.arange(0, 32)[None, None, :]
        u = tl.load(piece + tl.arange(0, 512)[None, None, :], mask=there, other=0)
        steps = tl.load(piece + 512 + at, mask=there, other=0)
        bases = tl.load(piece + 544 + at, mask=there, other=128)
        u = tl.join(u & 15, u >> 4).reshape(NUM_BLOCKS, 32, 16, 4, 2).permute(0, 2, 1, 4, 3).reshape(OUTPUTS, 8, 32)
        steps = steps.reshape(NUM_BLOCKS, 4, 2, 16).permute(0, 3, 1, 2).reshape(OUTPUTS, 8, 1)
        bases = bases.reshape(NUM_BLOCKS, 4, 16, 2).permute(0, 2, 1, 3).reshape(OUTPUTS, 8, 1)
        return ((u * steps + bases) ^ 128).to(tl.int8, bitcast=True).reshape(OUTPUTS, 256)


@triton.jit
def load_scales(weight, blocks, span, num_pieces, block_nbytes, FORMAT: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """The scales of a span of some blocks' outputs -> float32 [16 NUM_BLOCKS]; integer formats."""
    PIECE: tl.constexpr = 1024 if FORMAT == "int8" else 576
    start = weight + (blocks.to(tl.int64) * block_nbytes + num_pieces * PIECE + span * 32)[:, None]
    bits = tl.load(start.to(tl.pointer_type(tl.uint16)) + tl.arange(0, 16)[None, :])
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True).reshape(NUM_BLOCKS * 16)


@triton.jit
def multiply(
    weight,
    blocks,
    num_pieces,
    block_nbytes,
    x,
    x_scales,
    rows,
    there,
    x_stride,
    acc,
    FORMAT: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """acc [16 NUM_BLOCKS, rows] + the blocks' outputs for some rows of x.

    x: rounded rows (see kernels.gpu.rounding), zeros beyond the inputs; rows: which; there: which of those are wanted.
    """
    if FORMAT == "int8" or FORMAT == "int4":
        k = tl.arange(0, 256)
        num_spans = (num_pieces + 3) // 4
        for span in range(num_spans):
            a = load_weights(weight, blocks, span, num_pieces, block_nbytes, FORMAT, NUM_BLOCKS)
            b = tl.load(x + rows[None, :] * x_stride + (span * 256 + k)[:, None], mask=there[None, :], other=0)
            scales = load_scales(weight, blocks, span, num_pieces, block_nbytes, FORMAT, NUM_BLOCKS)
            row_scales = tl.load(x_scales + rows * num_spans + span, mask=there, other=0.0)
            acc = tl.fma(dot_of_bytes(a, b), scales[:, None] * row_scales[None, :], acc)
    else:
        k = tl.arange(0, 64)
        for piece in range(num_pieces):
            a = load_weights(weight, blocks, piece, num_pieces, block_nbytes, FORMAT, NUM_BLOCKS)
            b = tl.load(x + rows[None, :] * x_stride + (piece * 64 + k)[:, None], mask=there[None, :], other=0.0)
            acc = dot(a, b, acc)
    return acc


@triton.jit
def multiply_low_bytes(
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
    FORMAT: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """acc + what the low bytes of x add, where any of these rows' spans have them: weights of other spans are not read.

    A row without low bytes gets zeros added: its bits do not change.
    """
    k = tl.arange(0, 256)
    num_spans = (num_pieces + 3) // 4
    for span in range(num_spans):
        has_low = tl.load(is_low + rows * num_spans + span, mask=there, other=0)
        if tl.max(has_low.to(tl.int32), 0) > 0:
            a = load_weights(weight, blocks, span, num_pieces, block_nbytes, FORMAT, NUM_BLOCKS)
            b = tl.load(low + rows[None, :] * x_stride + (span * 256 + k)[:, None], mask=there[None, :], other=0)
            scales = load_scales(weight, blocks, span, num_pieces, block_nbytes, FORMAT, NUM_BLOCKS)
            row_scales = tl.load(x_scales + rows * num_spans + span, mask=there, other=0.0) * 0.00390625
            acc = tl.fma(dot_of_bytes(a, b), scales[:, None] * row_scales[None, :], acc)
    return acc
