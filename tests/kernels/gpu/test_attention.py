"""Attention over the paged cache in the interpreter: against the reference, and the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.backend import Sequences
from kernels.gpu.attention import PART, AttentionTile, AttentionWork, paged_attention, tokens_a_tile
from kernels.gpu.backend import TritonBackend
from kernels.gpu.grouping import cut_tiles
from kernels.torch_backend import TorchBackend
from tests.kernels.backends import assert_near, make_sequences, make_shape
from tests.kernels.test_attention import attend

TILE = AttentionTile(64, 64, 4, 1)


def run(query, keys, values, sequences: Sequences, shape, *, num_parts: int = 0, window: int | None = None, tile=TILE):
    chosen = torch.arange(len(sequences.context)).int()
    tiles = cut_tiles(sequences.row_begin, chosen, len(query), tokens_a_tile(tile, shape))
    work = AttentionWork(
        tiles,
        chosen,
        sequences.row_begin,
        sequences.context,
        sequences.block_begin,
        sequences.blocks,
        num_parts,
    )
    out = torch.full(query.shape, float("nan"))
    paged_attention(query, keys, values, work, sequences.positions, shape, tile, out, window)
    return out


def expected_of(query, keys, values, sequences: Sequences, shape, window: int | None = None):
    blocks = list(sequences.blocks.split(sequences.block_begin.diff().tolist()))
    rows, context = sequences.row_begin.tolist(), sequences.context.tolist()
    return reference.paged_attention(query.float(), keys, values, rows, context, blocks, shape.head_dim**-0.5, window)


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "dim", "qk_norm", "clip"),
    [
        (torch.float32, 4, 2, 64, "head", None),
        (torch.bfloat16, 8, 1, 32, "full", 0.8),
        (torch.float32, 6, 2, 80, "none", 0.5),
        (torch.bfloat16, 2, 2, 16, "none", None),
    ],
)
def test_a_layers_attention_equals_the_reference_on_any_mix_of_chunks_and_decode_rows(
    backend: TritonBackend, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, qk_norm: str, clip: float | None
):
    shape = make_shape(heads, kv_heads, dim, qk_norm, clip)
    context, rows = [1, 130, 40, 33, 16], [1, 1, 40, 17, 3]
    sequences = make_sequences(context, rows, 32)
    torch.manual_seed(1)
    qkv = torch.randn(sum(rows), (heads + 2 * kv_heads) * dim)
    keys, values = torch.randn(32, kv_heads, dim, 16).to(dtype), torch.randn(32, kv_heads, 16, dim).to(dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = attend(TorchBackend(), shape, qkv, expected_keys, expected_values, sequences)
    assert_near(
        attend(backend, shape, qkv, keys, values, sequences), expected, 1e-4 if dtype == torch.float32 else 2e-2
    )
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(keys, expected_keys, atol=bound, rtol=bound)
    torch.testing.assert_close(values, expected_values, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 70])
def test_parts_and_windows_equal_the_reference_and_parts_change_no_bit(dtype: torch.dtype, window: int | None):
    shape = make_shape(4, 2, 32)
    context = [2 * PART + 30, 65, 1]
    sequences = make_sequences(context, [1, 1, 1], 80)
    torch.manual_seed(3)
    keys, values = torch.randn(80, 2, 32, 16).to(dtype), torch.randn(80, 2, 16, 32).to(dtype)
    query = torch.randn(3, 4, 32).to(dtype)
    whole = run(query, keys, values, sequences, shape, window=window)
    assert_near(
        whole, expected_of(query, keys, values, sequences, shape, window), 2e-2 if dtype.itemsize == 2 else 1e-5
    )
    assert torch.equal(run(query, keys, values, sequences, shape, num_parts=3, window=window), whole)


@pytest.mark.parametrize("window", [None, 20])
def test_a_row_has_the_same_bits_alone_and_in_a_chunk_and_what_was_never_written_does_not_matter(window: int | None):
    shape = make_shape(4, 2, 32)
    torch.manual_seed(2)
    keys = torch.full((8, 2, 32, 16), float("nan"), dtype=torch.bfloat16)
    values = torch.full((8, 2, 16, 32), float("nan"), dtype=torch.bfloat16)
    sequences = make_sequences([90], [90], 8)
    for position, slot in enumerate(sequences.slots.tolist()):
        generator = torch.Generator().manual_seed(position)
        keys[slot // 16, :, :, slot % 16] = torch.randn(2, 32, generator=generator).bfloat16()
        values[slot // 16, :, slot % 16] = torch.randn(2, 32, generator=generator).bfloat16()
    query = torch.randn(90, 4, 32).bfloat16()
    whole = run(query, keys, values, sequences, shape, window=window)
    assert_near(whole, expected_of(query, keys.nan_to_num(), values.nan_to_num(), sequences, shape, window), 2e-2)
    for start, end in ((64, 65), (33, 40), (89, 90)):
        part = make_sequences([end], [end - start], 8)
        part.blocks = sequences.blocks[: len(part.blocks)].contiguous()
        alone = run(query[start:end], keys, values, part, shape, num_parts=end - start == 1, window=window)
        assert torch.equal(alone, whole[start:end]), (start, end)


def test_what_does_not_fit_is_refused(backend: TritonBackend):
    shape = make_shape(4, 2, 32)
    sequences = make_sequences([3], [1], 2)
    keys, values, query = torch.zeros(2, 2, 32, 16), torch.zeros(2, 2, 16, 32), torch.zeros(1, 4, 32)
    with pytest.raises(ValueError, match=r"keys \(2, 2, 8, 16\)"):
        run(query, keys[:, :, :8], values, sequences, shape)
    with pytest.raises(ValueError, match="expected a contiguous cache"):
        run(query, torch.zeros(2, 2, 16, 32).transpose(2, 3), values, sequences, shape)
    with pytest.raises(ValueError, match=r"expected contiguous torch\.float32"):
        run(query.bfloat16(), keys, values, sequences, shape)
    with pytest.raises(ValueError, match="sees nothing"):
        run(query, keys, values, sequences, shape, window=0)
    with pytest.raises(ValueError, match="heads share a key"):
        run(query, keys, values, sequences, shape, tile=AttentionTile(1, 64, 4, 1))
    qkv, output = (backend.make_linear(torch.randn(size), None, "float32") for size in ((256, 128), (128, 128)))
    attention = backend.make_attention(shape, torch.ones(128), qkv, output)
    with pytest.raises(ValueError, match="does not fit the sequences"):
        attention(torch.randn(2, 128), keys, values, sequences)
    with pytest.raises(ValueError, match="does not fit AttentionShape"):
        backend.make_attention(shape, torch.ones(128), output, output)
