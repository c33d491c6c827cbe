"""The Triton kernels in Triton's interpreter, on the CPU; what the kernel tests share."""

from __future__ import annotations

import numpy as np
import pytest
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

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


run = GridExecutor.__call__


def run_quietly(self, *args, **kwargs):
    """Rows that nobody wants may be anything: a GPU computes with what lies in memory there, and does not say so."""
    with np.errstate(all="ignore"):  # of this thread, which a device's may be
        return run(self, *args, **kwargs)


GridExecutor.__call__ = run_quietly


@pytest.fixture
def backend() -> TritonBackend:
    return TritonBackend()
