"""Rows as products want them: rounded to the weights' format, zeros up to a whole number of steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import launch, rows_a_program
from kernels.gpu.numbers import round_to_int, silu, to_bf16
from kernels.gpu.tiles import STEP
from kernels.reference import OUTLIER, SPAN

OUTLIER_SQUARED = tl.constexpr(OUTLIER**2)
_DTYPE = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.int8}


@dataclass(slots=True)
class RoundedRows:
    """n rows of K inputs. In integer formats an input is (value + low / 256) * its span's scale."""

    format: str
    num_inputs: int
    values: Tensor  # [n, K up to a whole number of steps] float32, bf16 or int8
    scales: Tensor | None = None  # float32 [n, spans]
    low: Tensor | None = None  # int8, as values; only of dense layers' rows
    is_low: Tensor | None = None  # int8 [n, spans]: whether low has anything but zeros

    @property
    def num_rows(self) -> int:
        return self.values.shape[0]


@triton.jit
def _round_rows_kernel(
    x,
    values,
    low,
    scales,
    is_low,
    num_rows,
    num_inputs,
    num_spans,
    x_stride,
    values_stride,
    FORMAT: tl.constexpr,
    IS_DENSE: tl.constexpr,
    IS_GATED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (rows, span)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    span = tl.program_id(1)
    k = span * 256 + tl.arange(0, 256)
    is_row = row < num_rows
    there = is_row[:, None] & (k < num_inputs)[None, :]
    at = x + row[:, None] * x_stride + k[None, :]
    v = tl.load(at, mask=there, other=0.0)
    if IS_GATED:
        v = silu(v) * tl.load(at + num_inputs, mask=there, other=0.0)
    to = row[:, None] * values_stride + k[None, :]
    there = is_row[:, None] & (k < values_stride)[None, :]
    if FORMAT == "float32":
        tl.store(values + to, v, mask=there)
    elif FORMAT == "bf16":
        tl.store(values + to, to_bf16(v), mask=there)
    else:
        largest = tl.max(tl.abs(v), 1)
        spans = row * num_spans + span
        tl.store(scales + spans, tl.math.div_rn(largest, 127.0), mask=is_row)
        divisor = tl.where(largest > 0.0, largest, 1.0)
        if IS_DENSE:
            width = tl.minimum(num_inputs - span * 256, 256).to(tl.float32)
            is_outlier = largest * largest * width > tl.sum(v * v, 1) * OUTLIER_SQUARED
            q = round_to_int(v * tl.math.div_rn(tl.where(is_outlier, 127.0 * 256.0, 127.0), divisor)[:, None])
            high = tl.where(is_outlier[:, None], tl.floor((q + 128.0) * 0.00390625), q)
            rest = tl.where(is_outlier[:, None], q - high * 256.0, 0.0)
            tl.store(values + to, high.to(tl.int8), mask=there)
            tl.store(low + to, rest.to(tl.int8), mask=there)
            tl.store(is_low + spans, is_outlier.to(tl.int8), mask=is_row)
        else:
            q = round_to_int(v * tl.math.div_rn(127.0, divisor)[:, None])
            tl.store(values + to, q.to(tl.int8), mask=there)


def round_rows(x: Tensor, format: str, *, is_dense: bool = False, is_gated: bool = False) -> RoundedRows:
    """x float32 [n, K], or with `is_gated` [n, 2 K], of which silu(first half) * second half is taken.

    The numbers are those of `reference.round_activations`, and the parts those of `reference.quantise_rows`.
    """
    if x.dtype != torch.float32 or x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"expected float32 rows, got {x.dtype} {tuple(x.shape)} with strides {x.stride()}")
    num_rows, num_inputs = x.shape[0], x.shape[1] // 2 if is_gated else x.shape[1]
    width = -(-num_inputs // STEP[format]) * STEP[format]
    if format == "float32" and not is_gated and width == num_inputs and x.is_contiguous():
        return RoundedRows(format, num_inputs, x)
    num_spans = -(-num_inputs // SPAN)
    has_scales = format in ("int8", "int4")
    has_low = has_scales and is_dense
    values = torch.empty(num_rows, width, dtype=_DTYPE[format], device=x.device)
    scales = torch.empty(num_rows, num_spans, device=x.device) if has_scales else None
    low = torch.empty_like(values) if has_low else None
    is_low = torch.empty(num_rows, num_spans, dtype=torch.int8, device=x.device) if has_low else None
    rows = rows_a_program(4)
    launch(
        _round_rows_kernel,
        (-(-num_rows // rows), num_spans),
        x,
        values,
        values if low is None else low,
        values if scales is None else scales,
        values if is_low is None else is_low,
        num_rows,
        num_inputs,
        num_spans,
        x.stride(0),
        width,
        options={"num_warps": 4, "num_stages": 1},
        FORMAT=format,
        IS_DENSE=has_low,
        IS_GATED=is_gated,
        ROWS=rows,
    )
    return RoundedRows(format, num_inputs, values, scales, low, is_low)
