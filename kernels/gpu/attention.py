"""Attention over the paged cache, for any mix of chunks and decode rows.

A row's context is cut at fixed positions into parts of PART tokens. In a part some keys are taken at a time; parts are
then merged in order. One variant takes the parts of its rows one after the other, another gives each part its own
program and merges afterwards: the same operations on the same numbers, so a row's bits depend on neither the variant
nor its company. What is masked for a row adds nothing to it, exactly: its maximum stays, and its terms are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import AttentionShape
from kernels.gpu.kv import check_cache
from kernels.gpu.launch import checked, launch, rows_a_program
from kernels.gpu.numbers import dot, to_float_or_bf16

PART = 512  # positions
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """What one program takes at a time: the same for every variant, since a row's bits depend on it."""

    rows: int  # (token, head of a group) pairs
    keys: int  # positions; divides PART
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """Some of a step's sequences, cut into tiles of query rows."""

    tiles: Tensor  # int32 [tiles, 3] (i, first, end) by `grouping.cut_tiles`, cut by `tokens_a_tile`
    chosen: Tensor  # int32 [n] the sequences that i is an index into
    row_begin: Tensor  # int32 [S + 1]
    context: Tensor  # int32 [S]
    block_begin: Tensor  # int32 [S + 1]
    blocks: Tensor  # int32
    num_parts: int  # of the longest context: each gets programs of its own; 0: one program takes all of them


def tokens_a_tile(tile: AttentionTile, shape: AttentionShape) -> int:
    """Tokens whose heads of one group fit a tile."""
    return max(1, tile.rows // (shape.num_heads // shape.num_kv_heads))


@triton.jit
def _merge(top, total, acc, part_top, part_total, part_acc):
    """Of two parts, (largest score, sum of powers, weighted values) as one; either may be empty."""
    new_top = tl.maximum(top, part_top)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    a, b = tl.exp2(top - safe), tl.exp2(part_top - safe)
    total = tl.fma(total, a, part_total * b)
    acc = tl.fma(acc, tl.expand_dims(a, -1), part_acc * tl.expand_dims(b, -1))
    return new_top, total, acc


@triton.jit
def _attend_part(
    q,
    keys,
    values,
    table,
    position,
    length,
    start,
    end,
    window,
    kv_head,
    num_kv_heads,
    head_dim,
    scale,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """q [ROWS, DIM] over the positions start..end of one part -> largest score, sum of powers, weighted values."""
    d = tl.arange(0, DIM)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for first in range(start, end, KEYS):
        at = first + tl.arange(0, KEYS)
        is_there = at < length  # what was never written may be anything
        block = tl.load(table + at // 16, mask=is_there, other=0).to(tl.int64) * num_kv_heads + kv_head
        wanted = is_there[None, :] & (d < head_dim)[:, None]
        k = tl.load(keys + (block * head_dim * 16 + at % 16)[None, :] + d[:, None] * 16, mask=wanted, other=0.0)
        scores = dot(q, k, tl.zeros([ROWS, KEYS], tl.float32)) * scale
        is_seen = at[None, :] <= position[:, None]
        if HAS_WINDOW:
            is_seen = is_seen & (at[None, :] > position[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        powers = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(top - safe)
        total = tl.fma(total, fade, tl.sum(powers, 1))
        wanted = is_there[:, None] & (d < head_dim)[None, :]
        v = tl.load(values + ((block * 16 + at % 16) * head_dim)[:, None] + d[None, :], mask=wanted, other=0.0)
        acc = dot(to_float_or_bf16(powers, values), v, acc * fade[:, None])
        top = new_top
    return top, total, acc


@triton.jit
def _paged_attention_kernel(
    query,
    keys,
    values,
    out,
    tops,
    totals,
    tiles,
    chosen,
    row_begin,
    context,
    block_begin,
    blocks,
    window,
    num_heads,
    num_kv_heads,
    head_dim,
    num_rows,
    scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    KEYS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Program (tile, kv head, part). Unsplit: out [T, heads, D] is finished; split: [parts, T, heads, D] are parts."""
    tile = tiles + tl.program_id(0) * 3
    i = tl.load(tile)
    if i < 0:
        return
    first_row, end_row = tl.load(tile + 1), tl.load(tile + 2)
    kv_head = tl.program_id(1)
    sequence = tl.load(chosen + i)
    length = tl.load(context + sequence)
    ahead = length - tl.load(row_begin + sequence + 1)  # a row's position less its number
    r = tl.arange(0, ROWS)
    row = first_row + r // GROUP
    is_there = row < end_row
    position = row + ahead
    last = end_row + ahead  # positions from here on are seen by no row
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first_row + ahead - window + 1, 0)
    d = tl.arange(0, DIM)
    at = (row.to(tl.int64) * num_heads + kv_head * GROUP + r % GROUP)[:, None] * head_dim + d[None, :]
    wanted = is_there[:, None] & (d < head_dim)[None, :]
    q = tl.load(query + at, mask=wanted, other=0.0)
    table = blocks + tl.load(block_begin + sequence)
    if IS_SPLIT:
        part = tl.program_id(2)
        start = tl.maximum(part * PART, begin // KEYS * KEYS)
        end = tl.minimum(part * PART + PART, last)
        if start >= end:
            return
        top, total, acc = _attend_part(
            q,
            keys,
            values,
            table,
            position,
            length,
            start,
            end,
            window,
            kv_head,
            num_kv_heads,
            head_dim,
            scale,
            ROWS,
            DIM,
            KEYS,
            HAS_WINDOW,
        )
        rows_at = (part * num_rows + row.to(tl.int64)) * num_heads + kv_head * GROUP + r % GROUP
        tl.store(tops + rows_at, top, mask=is_there)
        tl.store(totals + rows_at, total, mask=is_there)
        tl.store(out + rows_at[:, None] * head_dim + d[None, :], acc, mask=wanted)
    else:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        for part in range(begin // PART, (last + PART - 1) // PART):
            part_top, part_total, part_acc = _attend_part(
                q,
                keys,
                values,
                table,
                position,
                length,
                tl.maximum(part * PART, begin // KEYS * KEYS),
                tl.minimum(part * PART + PART, last),
                window,
                kv_head,
                num_kv_heads,
                head_dim,
                scale,
                ROWS,
                DIM,
                KEYS,
                HAS_WINDOW,
            )
            top, total, acc = _merge(top, total, acc, part_top, part_total, part_acc)
        tl.store(out + at, acc / tl.where(is_there, total, 1.0)[:, None], mask=wanted)


@triton.jit
def _merge_parts_kernel(
    parts,
    tops,
    totals,
    out,
    positions,
    window,
    num_heads,
    head_dim,
    num_rows,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Program i: ROWS (row, head) pairs' parts, in order."""
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_pair = pair < num_rows * num_heads
    position = tl.load(positions + pair // num_heads, mask=is_pair, other=0)
    begin = tl.zeros([ROWS], tl.int32)
    if HAS_WINDOW:
        begin = tl.maximum(position - window + 1, 0) // PART
    end = position // PART + 1
    d = tl.arange(0, DIM)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for part in range(tl.min(begin, 0), tl.max(end, 0)):
        is_mine = is_pair & (part >= begin) & (part < end)
        at = pair + part * num_rows.to(tl.int64) * num_heads
        wanted = is_mine[:, None] & (d < head_dim)[None, :]
        part_acc = tl.load(parts + at[:, None] * head_dim + d[None, :], mask=wanted, other=0.0)
        part_top = tl.load(tops + at, mask=is_mine, other=float("-inf"))
        part_total = tl.load(totals + at, mask=is_mine, other=0.0)
        top, total, acc = _merge(top, total, acc, part_top, part_total, part_acc)
    wanted = is_pair[:, None] & (d < head_dim)[None, :]
    result = acc / tl.where(is_pair, total, 1.0)[:, None]
    tl.store(out + pair[:, None] * head_dim + d[None, :], result, mask=wanted)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    work: AttentionWork,
    positions: Tensor,
    shape: AttentionShape,
    tile: AttentionTile,
    out: Tensor,
    window: int | None = None,
) -> None:
    """Causal grouped-query attention of the work's rows, each over the last `window` positions up to its own.

    query [T, heads, D] of the cache's dtype, positions int32 [T], out float32 [T, heads, D]: only the work's rows are
    written; if `work.num_parts` is not 0, those must be all rows. See `reference.paged_attention`.
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    check_cache(keys, values, shape)
    checked(query, keys.dtype, -1, heads, dim)
    num_rows = len(query)
    checked(positions, torch.int32, num_rows)
    checked(out, torch.float32, num_rows, heads, dim)
    if heads // kv_heads > tile.rows:
        raise ValueError(f"{heads // kv_heads} heads share a key; at most {tile.rows} can")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} positions sees nothing")
    is_split = work.num_parts > 1
    parts, tops, totals = out, out, out
    if is_split:
        parts = torch.empty(work.num_parts, num_rows, heads, dim, device=out.device)
        tops, totals = torch.empty(2, work.num_parts, num_rows, heads, device=out.device).unbind()
    launch(
        _paged_attention_kernel,
        (len(work.tiles), kv_heads, work.num_parts if is_split else 1),
        query,
        keys,
        values,
        parts,
        tops,
        totals,
        checked(work.tiles, torch.int32, -1, 3),
        checked(work.chosen, torch.int32, -1),
        checked(work.row_begin, torch.int32, -1),
        checked(work.context, torch.int32, -1),
        checked(work.block_begin, torch.int32, -1),
        checked(work.blocks, torch.int32, -1),
        window or 0,
        heads,
        kv_heads,
        dim,
        num_rows,
        dim**-0.5 * _LOG2_E,
        options=tile.options,
        GROUP=heads // kv_heads,
        ROWS=tile.rows,
        DIM=triton.next_power_of_2(dim),
        PART=PART,
        KEYS=tile.keys,
        IS_SPLIT=is_split,
        HAS_WINDOW=window is not None,
    )
    if is_split:
        rows = rows_a_program(1)
        launch(
            _merge_parts_kernel,
            (-(-num_rows * heads // rows),),
            parts,
            tops,
            totals,
            out,
            positions,
            window or 0,
            heads,
            dim,
            num_rows,
            options={"num_warps": 1, "num_stages": 1},
            PART=PART,
            ROWS=rows,
            DIM=triton.next_power_of_2(dim),
            HAS_WINDOW=window is not None,
        )
