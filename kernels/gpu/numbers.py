"""Arithmetic inside kernels, where Triton's interpreter and compiler need different words for the same numbers."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.launch import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def to_bf16(x):
    """float32 -> bf16, to the nearest, ties to even."""
    if INTERPRETED:  # its own cast cuts off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def to_float(x):
    """bf16 or float32 -> float32."""
    if x.dtype == tl.float32:
        return x
    elif INTERPRETED:  # its own cast is right, but slow
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def to_float_or_bf16(x, like):
    """float32 -> the dtype of `like`."""
    if like.dtype.element_ty == tl.bfloat16:
        return to_bf16(x)
    else:
        return x


@triton.jit
def round_to_int(x):
    """To the nearest whole number, ties to even, for magnitudes below 2**22; float32."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32; a and b float32 (never tf32) or bf16."""
    if INTERPRETED:  # it takes bf16's bits for whole numbers
        return tl.dot(to_float(a), to_float(b), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_of_bytes(a, b):
    """a b of int8, exact, as float32; sums stay below 2**24."""
    if INTERPRETED:  # its whole numbers are slow, and these floats are exact
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))
