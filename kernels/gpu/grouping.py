"""Which rows each expert gets, in tiles: positions sorted by expert, and every expert's cut into tiles of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import checked, launch

_CHUNK = 1024  # positions looked at together
_TILES = 32  # tiles that one program finds


@triton.jit
def _group_by_expert_kernel(ids, begin, positions, num_positions, num_experts, CHUNK: tl.constexpr):
    """Program e finds expert e's positions; a stable counting sort without atomics."""
    expert = tl.program_id(0)
    at = tl.arange(0, CHUNK)
    before = 0
    for start in range(0, num_positions, CHUNK):
        found = tl.load(ids + start + at, mask=start + at < num_positions, other=num_experts)
        before += tl.sum((found < expert).to(tl.int32), 0)
    tl.store(begin + expert, before)
    if expert == num_experts - 1:
        tl.store(begin + num_experts, num_positions)
    for start in range(0, num_positions, CHUNK):
        found = tl.load(ids + start + at, mask=start + at < num_positions, other=num_experts)
        is_mine = found == expert
        mine = is_mine.to(tl.int32)
        tl.store(positions + before + tl.cumsum(mine, 0) - 1, start + at, mask=is_mine)
        before += tl.sum(mine, 0)


def group_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """ids int32 [T, k] below num_experts -> begin int32 [num_experts + 1], positions int32 [T * k].

    The positions (token * k + rank) of expert e are positions[begin[e] .. begin[e + 1]], ascending. See
    `reference.group_by_expert`.
    """
    checked(ids, torch.int32, -1, -1)
    begin = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    positions = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
    launch(
        _group_by_expert_kernel,
        (num_experts,),
        ids,
        begin,
        positions,
        ids.numel(),
        num_experts,
        options={"num_warps": 4, "num_stages": 1},
        CHUNK=_CHUNK,
    )
    return begin, positions


@triton.jit
def _cut_tiles_kernel(
    begin, chosen, tiles, num_chosen, num_tiles, rows_a_tile, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    c = tl.arange(0, BLOCK)
    segment = tl.load(chosen + c, mask=c < num_chosen, other=0)
    first = tl.load(begin + segment, mask=c < num_chosen, other=0)
    end = tl.load(begin + segment + 1, mask=c < num_chosen, other=0)
    num = (end - first + rows_a_tile - 1) // rows_a_tile
    last_tile = tl.cumsum(num, 0)  # of each, one past
    t = tl.program_id(0) * TILES + tl.arange(0, TILES)
    is_in = (t[:, None] < last_tile[None, :]) & (
        t[:, None] >= (last_tile - num)[None, :]
    )  # [TILES, BLOCK], one or none
    picked = is_in.to(tl.int32)
    row = tl.sum(picked * (first[None, :] + (t[:, None] - (last_tile - num)[None, :]) * rows_a_tile), 1)
    there = t < num_tiles
    tl.store(tiles + t * 3, tl.sum(picked * (c + 1)[None, :], 1) - 1, mask=there)
    tl.store(tiles + t * 3 + 1, row, mask=there)
    tl.store(tiles + t * 3 + 2, tl.minimum(row + rows_a_tile, tl.sum(picked * end[None, :], 1)), mask=there)


def cut_tiles(begin: Tensor, chosen: Tensor, num_rows: int, rows_a_tile: int) -> Tensor:
    """Cut some segments into tiles of at most `rows_a_tile` rows -> int32 [tiles, 3]: (i, first row, end row).

    begin int32 [segments + 1]; chosen int32 [n]: which, and i is the index into it; num_rows: of all segments
    together, or more. The tiles' number is bounded by that, so that nothing is read back; those left over have i = -1.
    See `reference.cut_tiles`.
    """
    checked(begin, torch.int32, -1)
    checked(chosen, torch.int32, -1)
    num_chosen = len(chosen)
    num_tiles = min(num_chosen + num_rows // rows_a_tile, num_rows)
    tiles = torch.empty(num_tiles, 3, dtype=torch.int32, device=begin.device)
    launch(
        _cut_tiles_kernel,
        (-(-num_tiles // _TILES),),
        begin,
        chosen,
        tiles,
        num_chosen,
        num_tiles,
        rows_a_tile,
        options={"num_warps": 4, "num_stages": 1},
        TILES=_TILES,
        BLOCK=triton.next_power_of_2(max(1, num_chosen)),
    )
    return tiles
