"""The Triton kernels in Triton's interpreter, on the CPU; what the kernel tests share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from triton.runtime.interpreter import InterpretedFunction

from kernels.gpu.backend import TritonBackend
from kernels.gpu.launch import INTERPRETED

assert INTERPRETED, "triton was imported before TRITON_INTERPRET was set"


call = InterpretedFunction.__call__


def call_helper(self, *args, **kwargs):
    """By itself it patches triton.language again for each helper that a kernel calls: half of the time."""
    if self.fn.__module__.startswith("kernels.gpu"):
        return self.rewrite()(*args, **kwargs)
    return call(self, *args, **kwargs)


InterpretedFunction.__call__ = call_helper


@pytest.fixture(autouse=True)
def _rows_that_nobody_wants_may_be_anything() -> Iterator[None]:
    """A GPU computes with what lies in memory there, and does not say so."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def backend() -> TritonBackend:
    return TritonBackend()
