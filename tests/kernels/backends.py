"""What the kernel tests share: every backend this CPU can run, and inputs for them."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import AttentionShape, Backend, Records, Sequences
from kernels.quant.formats import FORMATS
from kernels.torch_backend import TorchBackend
from tests.kernels.test_quant import random_weights

ISAS = ("amx", "avx512", "avx2", "portable")
NATIVE = [f"native-{isa}" for isa in ISAS]


def make_backend(name: str, num_threads: int = 2) -> Backend:
    if not name.startswith("native-"):
        return TorchBackend()
    from kernels.cpu.native import NativeBackend

    try:
        return NativeBackend(num_threads, name.removeprefix("native-"))
    except RuntimeError as error:
        if "this CPU cannot run" in str(error):
            pytest.skip(str(error))
        raise


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    scale = expected.square().mean().sqrt()
    assert scale > 0
    error = (actual - expected).abs().max() / scale
    assert error <= tolerance, f"error {error:.2e} is above {tolerance:.2e}"


def make_records(format: str, hidden: int, inner: int, num_experts: int) -> Records:
    layout = FORMATS[format].layout(hidden, inner)
    slots = []
    for expert in range(num_experts):
        aligned = torch.zeros(layout.nbytes + 4096, dtype=torch.uint8)
        record = aligned[-aligned.data_ptr() % 4096 :][: layout.nbytes]
        FORMATS[format].pack(random_weights(hidden, inner, seed=expert), record)
        slots.append(record)
    return Records(layout, slots)


def make_sequences(context: list[int], rows: list[int], num_blocks: int, seed: int = 0) -> Sequences:
    """Sequences whose last `rows` tokens are new, in shuffled blocks."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    positions, slots, row_begin, block_begin, blocks = [], [], [0], [0], []
    for length, num_rows in zip(context, rows, strict=True):
        mine = [order.pop() for _ in range(-(-length // 16))]
        for p in range(length - num_rows, length):
            positions.append(p)
            slots.append(mine[p // 16] * 16 + p % 16)
        blocks += mine
        row_begin.append(len(positions))
        block_begin.append(len(blocks))
    return Sequences(
        *(torch.tensor(v, dtype=torch.int32) for v in (positions, slots, row_begin, context, block_begin, blocks))
    )


def make_shape(heads: int, kv_heads: int, dim: int, qk_norm: str = "none", clip: float | None = None) -> AttentionShape:
    torch.manual_seed(heads)
    sizes = {"none": (0, 0), "head": (dim, dim), "full": (heads * dim, kv_heads * dim)}[qk_norm]
    angles = torch.rand(512, dim // 2) * 6
    angles = torch.cat((angles, angles), -1)
    q_norm, k_norm = (torch.rand(size) + 0.5 if size else None for size in sizes)
    return AttentionShape(heads, kv_heads, dim, qk_norm, 1e-5, clip, q_norm, k_norm, angles.cos(), angles.sin())
