"""Root mean square normalisation of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import checked, launch, rows_a_program


@triton.jit
def _rms_norm_kernel(x, weight, out, num_rows, size, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    at = row[:, None] * size + k[None, :]
    there = (row < num_rows)[:, None] & (k < size)[None, :]
    v = tl.load(x + at, mask=there, other=0.0)
    scale = tl.rsqrt(tl.sum(v * v, 1) / size + eps)
    tl.store(out + at, tl.load(weight + k, mask=k < size, other=0.0)[None, :] * (v * scale[:, None]), mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x float32 [n, H], weight float32 [H] -> [n, H]; see `reference.rms_norm`."""
    checked(x, torch.float32, -1, -1)
    num_rows, size = x.shape
    checked(weight, torch.float32, size)
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    options = {"num_warps": min(16, max(1, block // 512)), "num_stages": 1}
    rows = rows_a_program(1)
    launch(
        _rms_norm_kernel,
        (-(-num_rows // rows),),
        x,
        weight,
        out,
        num_rows,
        size,
        eps,
        options=options,
        ROWS=rows,
        BLOCK=block,
    )
    return out
