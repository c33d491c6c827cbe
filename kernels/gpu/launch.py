"""The one door to the GPU: starts a kernel, or, to compile it ahead of time, notes what would have been started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET was set when triton was imported


def _interpret_products_in_double() -> None:
    """Make the interpreter's float32 products the same bits for any number of rows, as a GPU's are.

    It leaves them to a BLAS, which on some CPUs adds in another order for another shape. In double precision the order
    is below what a float32 sees.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if d.data.dtype != np.float32 or a.dtype.primitive_bitwidth == 8:
            return plain(self, a, b, d, *options)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.float32)
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    _interpret_products_in_double()


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and what it is started with; tensors may be on any device, `meta` too."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within, nothing runs: launches are appended to the list that is given."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, options: dict[str, int], **constants: Any) -> None:
    """Start `kernel` over `grid`, positional arguments first; raises `RuntimeError` where no GPU can run it."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, constants, options))
        return
    if 0 in grid:
        return
    for arg in args:
        if isinstance(arg, Tensor):
            _require_device(arg)
            break
    kernel[grid](*args, **constants, **options)


def rows_a_program(on_gpu: int) -> int:
    """Rows that a program of a kernel without products takes: many where every operation costs the same."""
    return 64 if INTERPRETED else on_gpu


def is_available() -> bool:
    """Whether kernels can run in this process: on a GPU, or interpreted."""
    return INTERPRETED or torch.cuda.is_available()


def checked(x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """`x`, if it is contiguous, of that dtype and shape (-1: any); else raises `ValueError`."""
    if x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"expected contiguous {dtype}, got {x.dtype} with strides {x.stride()}")
    if len(x.shape) != len(shape) or any(want not in (-1, got) for want, got in zip(shape, x.shape, strict=True)):
        raise ValueError(f"expected shape {shape}, got {tuple(x.shape)}")
    return x


def _require_device(x: Tensor) -> None:
    if not (x.is_cuda or INTERPRETED):
        raise RuntimeError(
            "the Triton kernels need a GPU; without one they run only in Triton's interpreter, "
            "with TRITON_INTERPRET=1 in the environment (very slow, for tests)"
        )
