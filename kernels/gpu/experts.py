"""Experts' products, computed from the cache slots that their records lie in: gate and up with SiLU, down, combine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import Tile
from kernels.gpu.launch import checked, launch, rows_a_program
from kernels.gpu.matrix import PackedShape
from kernels.gpu.numbers import silu
from kernels.gpu.rounding import RoundedRows
from kernels.gpu.tiles import multiply
from kernels.quant.layout import RecordLayout


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """Where the work is: tiles of positions sorted by expert, and where each expert's record begins."""

    tiles: Tensor  # int32 [tiles, 3] (i, first, end) by `grouping.cut_tiles`; first and end index `positions`
    offsets: Tensor  # int64 [experts], from the arena's start, in units of 64 bytes
    positions: Tensor  # int32 [T * k]


@triton.jit
def _find_tile(tiles, offsets, section, ROWS: tl.constexpr):
    """-> which expert, -1 if there is no work; its section's offset from the arena; rows [ROWS], which are wanted."""
    tile = tiles + tl.program_id(0) * 3
    expert = tl.load(tile)
    rows = tl.load(tile + 1) + tl.arange(0, ROWS)
    there = rows < tl.load(tile + 2)
    offset = tl.load(offsets + tl.maximum(expert, 0)) * 64 + section
    return expert, offset, rows, there


@triton.jit
def _expert_gate_up_kernel(
    arena,
    tiles,
    offsets,
    positions,
    x,
    x_scales,
    out,
    section,
    num_active,
    num_units,
    num_pieces,
    block_nbytes,
    x_stride,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    expert, offset, rows, there = _find_tile(tiles, offsets, section, ROWS)
    if expert < 0:
        return
    NUM_BLOCKS: tl.constexpr = OUTPUTS // 16
    UNITS: tl.constexpr = OUTPUTS // 2
    weight = arena + offset
    tokens = tl.load(positions + rows, mask=there, other=0).to(tl.int64) // num_active
    blocks = tl.minimum(tl.program_id(1) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS), num_units // 8 - 1)
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    acc = multiply(
        weight, blocks, num_pieces, block_nbytes, x, x_scales, tokens, there, x_stride, acc, FORMAT, NUM_BLOCKS
    )
    pairs = acc.reshape(NUM_BLOCKS // 2, 2, 16, ROWS).permute(0, 2, 3, 1)  # blocks of gate and up take turns
    gate, up = tl.split(pairs)
    n = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    to = out + rows.to(tl.int64)[None, :] * num_units + n[:, None]
    products = (silu(gate) * up).reshape(UNITS, ROWS)
    tl.store(to, products, mask=there[None, :] & (n < num_units)[:, None])


def expert_gate_up(
    x: RoundedRows, work: ExpertTiles, arena: Tensor, layout: RecordLayout, num_active: int, tile: Tile
) -> Tensor:
    """x: rows of T tokens rounded for the layout's format -> float32 [T * k, I], silu(gate x) * (up x) by sorted row.

    Row r is of the token positions[r] // num_active. Rows that no tile has are not written. `arena` is any uint8
    tensor in the memory that the work's offsets are counted from. See `reference.expert_gate_up`.
    """
    shape = PackedShape(layout.format, 2 * layout.intermediate_size, layout.hidden_size)
    _check(x, shape, work, arena)
    num_units = layout.intermediate_size
    out = torch.empty(len(work.positions), num_units, device=x.values.device)
    launch(
        _expert_gate_up_kernel,
        (len(work.tiles), -(-2 * num_units // tile.outputs)),
        arena,
        work.tiles,
        work.offsets,
        work.positions,
        x.values,
        x.values if x.scales is None else x.scales,
        out,
        layout["gate_up"].offset,
        num_active,
        num_units,
        shape.num_pieces,
        shape.block_nbytes,
        x.values.shape[1],
        options=tile.options,
        FORMAT=layout.format,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
    )
    return out


@triton.jit
def _expert_down_kernel(
    arena,
    tiles,
    offsets,
    positions,
    x,
    x_scales,
    out,
    section,
    num_outputs,
    num_pieces,
    block_nbytes,
    x_stride,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    expert, offset, rows, there = _find_tile(tiles, offsets, section, ROWS)
    if expert < 0:
        return
    NUM_BLOCKS: tl.constexpr = OUTPUTS // 16
    weight = arena + offset
    blocks = tl.minimum(tl.program_id(1) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS), num_outputs // 16 - 1)
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    wide_rows = rows.to(tl.int64)
    acc = multiply(
        weight, blocks, num_pieces, block_nbytes, x, x_scales, wide_rows, there, x_stride, acc, FORMAT, NUM_BLOCKS
    )
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    to = tl.load(positions + rows, mask=there, other=0).to(tl.int64)
    tl.store(out + to[None, :] * num_outputs + n[:, None], acc, mask=there[None, :] & (n < num_outputs)[:, None])


def expert_down(
    x: RoundedRows, work: ExpertTiles, arena: Tensor, layout: RecordLayout, tile: Tile, outputs: Tensor
) -> None:
    """x: what `expert_gate_up` gave, rounded -> outputs float32 [T * k, H], each product in its position's row.

    Products are kept apart for `combine`. See `reference.expert_down`.
    """
    shape = PackedShape(layout.format, layout.hidden_size, layout.intermediate_size)
    _check(x, shape, work, arena)
    checked(outputs, torch.float32, len(work.positions), layout.hidden_size)
    launch(
        _expert_down_kernel,
        (len(work.tiles), -(-layout.hidden_size // tile.outputs)),
        arena,
        work.tiles,
        work.offsets,
        work.positions,
        x.values,
        x.values if x.scales is None else x.scales,
        outputs,
        layout["down"].offset,
        layout.hidden_size,
        shape.num_pieces,
        shape.block_nbytes,
        x.values.shape[1],
        options=tile.options,
        FORMAT=layout.format,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
    )


@triton.jit
def _combine_kernel(
    outputs,
    weights,
    add_to,
    num_tokens,
    size,
    num_active,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (token < num_tokens)[:, None] & (k < size)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for rank in range(num_active):
        at = token * num_active + rank
        product = tl.load(outputs + at[:, None] * size + k[None, :], mask=there, other=0.0)
        total = tl.fma(product, tl.load(weights + at, mask=token < num_tokens, other=0.0)[:, None], total)
    to = add_to + token[:, None] * size + k[None, :]
    tl.store(to, tl.load(to, mask=there, other=0.0) + total, mask=there)


def combine(outputs: Tensor, weights: Tensor, add_to: Tensor) -> None:
    """outputs float32 [T * k, H] times weights [T, k], added in routing order to add_to [T, H]; `reference.combine`."""
    checked(weights, torch.float32, -1, -1)
    num_tokens, num_active = weights.shape
    checked(add_to, torch.float32, num_tokens, -1)
    size = add_to.shape[1]
    checked(outputs, torch.float32, num_tokens * num_active, size)
    block = min(1024, triton.next_power_of_2(size))
    rows = rows_a_program(1)
    launch(
        _combine_kernel,
        (-(-num_tokens // rows), -(-size // block)),
        outputs,
        weights,
        add_to,
        num_tokens,
        size,
        num_active,
        options={"num_warps": 4, "num_stages": 1},
        ROWS=rows,
        BLOCK=block,
    )


def _check(x: RoundedRows, shape: PackedShape, work: ExpertTiles, arena: Tensor) -> None:
    if (x.format, x.num_inputs) != (shape.format, shape.num_inputs):
        raise ValueError(f"{x.format} rows of {x.num_inputs} do not fit {shape}")
    if arena.dtype != torch.uint8 or arena.data_ptr() % 64:
        raise ValueError("the arena must be uint8 and aligned to 64 bytes")
    checked(work.tiles, torch.int32, -1, 3)
    checked(work.offsets, torch.int64, -1)
    checked(work.positions, torch.int32, -1)
