"""From a layer's joint projection to rotated queries, and keys and values in the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import AttentionShape
from kernels.gpu.launch import checked, launch, rows_a_program
from kernels.gpu.numbers import to_float_or_bf16
from kernels.reference import BLOCK_SIZE

_KV_DTYPES = (torch.float32, torch.bfloat16)


@triton.jit
def _append_kv_kernel(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    positions,
    slots,
    query,
    keys,
    values,
    num_rows,
    num_heads,
    num_kv_heads,
    head_dim,
    eps,
    clip,
    NORM: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    ROW: tl.constexpr,
):
    """Program (rows, head): heads of queries, then of keys, then of values. HALF, ROW: powers of two that hold them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    half = head_dim // 2
    d = tl.arange(0, HALF)[None, :]
    is_row = row < num_rows
    is_dim = d < half
    there = is_row[:, None] & is_dim
    at = qkv + (row * (num_heads + 2 * num_kv_heads) * head_dim)[:, None]
    first = tl.load(at + head * head_dim + d, mask=there, other=0.0)
    second = tl.load(at + head * head_dim + half + d, mask=there, other=0.0)
    is_query = head < num_heads
    is_value = head >= num_heads + num_kv_heads
    kv_head = (head - num_heads) % num_kv_heads
    if NORM == "full":
        if not is_value:
            begin = tl.where(is_query, 0, num_heads * head_dim)
            size = tl.where(is_query, num_heads, num_kv_heads) * head_dim
            k = tl.arange(0, ROW)[None, :]
            every = tl.load(at + begin + k, mask=is_row[:, None] & (k < size), other=0.0)
            scale = tl.rsqrt(tl.sum(every * every, 1) / size + eps)[:, None]
            if is_query:
                norm = q_norm + head * head_dim
            else:
                norm = k_norm + kv_head * head_dim
            first = first * scale * tl.load(norm + d, mask=is_dim, other=0.0)
            second = second * scale * tl.load(norm + half + d, mask=is_dim, other=0.0)
    if HAS_CLIP:
        first = tl.minimum(tl.maximum(first, -clip), clip)
        second = tl.minimum(tl.maximum(second, -clip), clip)
    slot = tl.load(slots + row, mask=is_row, other=0).to(tl.int64)
    block = slot // 16 * num_kv_heads + kv_head
    if is_value:
        to = values + ((block * 16 + slot % 16) * head_dim)[:, None] + d
        tl.store(to, to_float_or_bf16(first, values), mask=there)
        tl.store(to + half, to_float_or_bf16(second, values), mask=there)
    else:
        if NORM == "head":
            squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            scale = tl.rsqrt(squares / head_dim + eps)[:, None]
            if is_query:
                norm = q_norm
            else:
                norm = k_norm
            first = first * scale * tl.load(norm + d, mask=is_dim, other=0.0)
            second = second * scale * tl.load(norm + half + d, mask=is_dim, other=0.0)
        angle = (tl.load(positions + row, mask=is_row, other=0).to(tl.int64) * head_dim)[:, None] + d
        turned = first * tl.load(cos + angle, mask=there, other=0.0)
        turned -= second * tl.load(sin + angle, mask=there, other=0.0)
        other = second * tl.load(cos + angle + half, mask=there, other=0.0)
        other += first * tl.load(sin + angle + half, mask=there, other=0.0)
        if is_query:
            to = query + ((row * num_heads + head) * head_dim)[:, None] + d
            tl.store(to, to_float_or_bf16(turned, query), mask=there)
            tl.store(to + half, to_float_or_bf16(other, query), mask=there)
        else:
            to = keys + (block * head_dim * 16 + slot % 16)[:, None] + d * 16
            tl.store(to, to_float_or_bf16(turned, keys), mask=there)
            tl.store(to + half * 16, to_float_or_bf16(other, keys), mask=there)


def append_kv(
    qkv: Tensor, shape: AttentionShape, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Norm, clip and rotate a projection float32 [T, (heads + 2 kv_heads) * D] -> queries [T, heads, D] of KV's dtype.

    Keys and values go to the token slots [T] of keys [blocks, kv_heads, D, 16] and values [blocks, kv_heads, 16, D].
    See `reference.rope` and `reference.append_kv`.
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    checked(qkv, torch.float32, -1, (heads + 2 * kv_heads) * dim)
    num_rows = len(qkv)
    checked(positions, torch.int32, num_rows)
    checked(slots, torch.int32, num_rows)
    check_cache(keys, values, shape)
    query = torch.empty(num_rows, heads, dim, dtype=keys.dtype, device=qkv.device)
    rows = rows_a_program(1)
    launch(
        _append_kv_kernel,
        (-(-num_rows // rows), heads + 2 * kv_heads),
        qkv,
        qkv if shape.q_norm is None else shape.q_norm,
        qkv if shape.k_norm is None else shape.k_norm,
        shape.cos,
        shape.sin,
        positions,
        slots,
        query,
        keys,
        values,
        num_rows,
        heads,
        kv_heads,
        dim,
        shape.eps,
        shape.clip or 0.0,
        options={"num_warps": 4 if shape.qk_norm == "full" else 1, "num_stages": 1},
        NORM=shape.qk_norm,
        HAS_CLIP=shape.clip is not None,
        ROWS=rows,
        HALF=triton.next_power_of_2(dim // 2),
        ROW=triton.next_power_of_2(max(heads, kv_heads) * dim),
    )
    return query


def check_cache(keys: Tensor, values: Tensor, shape: AttentionShape) -> None:
    """Raises `ValueError` if the cache is not laid out as the kernels read it."""
    tail = (shape.num_kv_heads, shape.head_dim, BLOCK_SIZE)
    fits = keys.shape[1:] == tail and values.shape == (len(keys), tail[0], BLOCK_SIZE, tail[1])
    if not fits or keys.dtype != values.dtype or keys.dtype not in _KV_DTYPES:
        raise ValueError(
            f"keys {tuple(keys.shape)} {keys.dtype} or values {tuple(values.shape)} {values.dtype} "
            f"does not fit {shape.num_kv_heads} heads of {shape.head_dim}"
        )
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("expected a contiguous cache")
