"""Attention over the paged cache against the reference, on every backend."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import AttentionShape, Backend, Sequences
from kernels.torch_backend import TorchBackend
from tests.kernels.backends import assert_near, make_backend, make_sequences, make_shape


def attend(backend: Backend, shape: AttentionShape, x: torch.Tensor, keys, values, sequences: Sequences):
    """The attention of a layer whose q, k and v are the components of x, and whose output is the residual's first."""
    width, attended = x.shape[1], shape.num_heads * shape.head_dim
    qkv, output = torch.eye(width), torch.eye(width, attended)
    linears = [backend.make_linear(weight, None, "float32") for weight in (qkv, output)]
    residual = x * 1e-2  # far below the output; the norm makes it x again
    before = residual.clone()
    backend.make_attention(shape, torch.ones(width), *linears)(residual, keys, values, sequences)
    assert torch.equal(residual[:, attended:], before[:, attended:])
    return residual[:, :attended]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "qk_norm", "clip"),
    [
        (4, 4, 16, "none", None),
        (4, 2, 64, "head", None),
        (8, 1, 32, "full", 0.8),
        (6, 3, 80, "none", 0.5),
        (2, 1, 128, "head", None),
    ],
)
def test_attention_equals_the_reference_on_any_mix_of_chunks_and_decode_rows(
    backend: Backend, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, qk_norm: str, clip: float | None
):
    shape = make_shape(heads, kv_heads, dim, qk_norm, clip)
    context, rows = [1, 300, 40, 33, 16, 129], [1, 1, 40, 17, 16, 3]
    sequences = make_sequences(context, rows, 64)
    torch.manual_seed(1)
    qkv = torch.randn(sum(rows), (heads + 2 * kv_heads) * dim)
    keys, values = torch.randn(64, kv_heads, dim, 16).to(dtype), torch.randn(64, kv_heads, 16, dim).to(dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = attend(TorchBackend(), shape, qkv, expected_keys, expected_values, sequences)
    out = attend(backend, shape, qkv, keys, values, sequences)
    assert_near(out, expected, 1e-4 if dtype == torch.float32 else 2e-2)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(keys, expected_keys, atol=bound, rtol=bound)
    torch.testing.assert_close(values, expected_values, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_gives_a_row_the_same_bits_in_any_chunk_company_and_number_of_threads(
    native: str, dtype: torch.dtype
):
    shape = make_shape(4, 2, 64)
    torch.manual_seed(2)
    qkv = torch.randn(90, 8 * 64)
    keys = torch.full((32, 2, 64, 16), float("nan"), dtype=dtype)  # what was never written must not matter
    values = torch.full((32, 2, 16, 64), float("nan"), dtype=dtype)
    whole_sequence = make_sequences([90], [90], 32)
    whole = attend(make_backend(native), shape, qkv, keys, values, whole_sequence)
    assert whole.isfinite().all()
    for num_threads in (1, 3):
        backend = make_backend(native, num_threads)
        for chunk in (1, 7, 64):
            for start in range(0, 90, chunk):
                end = min(90, start + chunk)
                part = make_sequences([end], [end - start], 32)
                blocks = whole_sequence.blocks[: len(part.blocks)].contiguous()
                part.blocks = blocks
                part.slots = whole_sequence.slots[start:end].contiguous()
                out = attend(backend, shape, qkv[start:end].contiguous(), keys, values, part)
                assert torch.equal(out, whole[start:end]), (num_threads, chunk, start)
