"""The reference against torch's own operators and against formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from kernels import reference


def test_rms_norm_equals_torch():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 48) * 3, torch.randn(48)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (48,), weight, 1e-5))


def test_rope_rotates_each_pair_by_its_angle():
    torch.manual_seed(0)
    x, angles = torch.randn(3, 2, 8), torch.rand(3, 4) * 6
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(3, 1, 4), angles[:, None])
    torch.testing.assert_close(reference.rope(x, cos, sin), torch.cat((pairs.real, pairs.imag), -1))


def paged(num_blocks: int, kv_heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num_blocks, kv_heads, dim, 16), torch.randn(num_blocks, kv_heads, 16, dim)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_paged_attention_equals_torchs_on_any_mix_of_chunks_and_decode_rows(kv_heads: int):
    torch.manual_seed(0)
    context, rows = [1, 17, 30, 48, 5], [1, 1, 30, 6, 5]
    keys, values = paged(16, kv_heads, 8)
    blocks = list(torch.randperm(16)[: sum(-(-c // 16) for c in context)].int().split([-(-c // 16) for c in context]))
    query = torch.randn(sum(rows), 4, 8)
    begin = [0, *torch.tensor(rows).cumsum(0).tolist()]
    out = reference.paged_attention(query, keys, values, begin, context, blocks, 0.25)
    for s, length in enumerate(context):
        k = keys[blocks[s].long()].transpose(2, 3).transpose(0, 1).flatten(1, 2)[:, :length]
        v = values[blocks[s].long()].transpose(0, 1).flatten(1, 2)[:, :length]
        k, v = (part.repeat_interleave(4 // kv_heads, 0) for part in (k, v))
        mask = torch.ones(rows[s], length, dtype=torch.bool).tril(length - rows[s])
        q = query[begin[s] : begin[s + 1]].transpose(0, 1)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25)
        torch.testing.assert_close(out[begin[s] : begin[s + 1]], expected.transpose(0, 1))


def test_append_kv_writes_the_named_slots_only():
    keys, values = torch.zeros(2, 2, 4, 16), torch.zeros(2, 2, 16, 4)
    slots = torch.tensor([16 + 6, 0, 3], dtype=torch.int32)
    reference.append_kv(keys, values, torch.ones(3, 2, 4), torch.full((3, 2, 4), 2.0), slots)
    assert keys.sum((1, 2)).flatten().nonzero().flatten().tolist() == [0, 3, 22]
    assert values.sum((1, 3)).flatten().nonzero().flatten().tolist() == [0, 3, 22]
    assert (keys.sum(), values.sum()) == (24, 48)


def test_routing_takes_the_best_and_weighs_them_as_the_family_wants():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    probs = logits.softmax(-1)[0]
    ids, weights = reference.route(logits, 2, "softmax")
    assert ids.tolist() == [[1, 3]]
    torch.testing.assert_close(weights[0], probs[[1, 3]])
    _, weights = reference.route(logits, 2, "softmax_renormalised")
    torch.testing.assert_close(weights[0], probs[[1, 3]] / probs[[1, 3]].sum())
    ids, weights = reference.route(logits, 3, "unweighted")
    assert ids.tolist() == [[1, 3, 2]]
    assert weights.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("format", "bound"), [("float32", 0.0), ("bf16", 2**-8), ("int8", 0.5 / 127), ("int4", 0.5 / 127)]
)
def test_activations_are_rounded_within_what_their_format_holds(format: str, bound: float):
    torch.manual_seed(0)
    x = torch.randn(5, 600) * torch.logspace(-3, 3, 600)

    def spans(values: torch.Tensor) -> torch.Tensor:
        return F.pad(values, (0, 168)).unflatten(-1, (-1, 256)).abs()

    rounded = reference.round_activations(x, format)
    largest, error = spans(x).amax(-1, keepdim=True), spans(rounded - x)
    assert (error <= 1.001 * bound * largest).all()
    assert format == "float32" or error.max() > 0
    assert (reference.round_activations(torch.zeros(2, 32), format) == 0).all()


def test_a_dense_span_with_an_outlier_is_rounded_to_sixteen_bits():
    torch.manual_seed(0)
    x = torch.randn(2, 512)
    x[0, 300] = 100.0
    error = (reference.round_activations(x, "int8", is_dense=True) - x).abs()
    assert error[0, 256:].max() <= 0.501 * 100 / (127 * 256)
    assert error[0, 256:].max() > 0
    assert torch.equal(error[1], (reference.round_activations(x[1:], "int8") - x[1:]).abs()[0])


def test_combine_is_the_weighted_sum_in_routing_order():
    torch.manual_seed(0)
    outputs, weights = torch.randn(5, 3, 8), torch.rand(5, 3)
    torch.testing.assert_close(reference.combine(outputs, weights), torch.einsum("tkh,tk->th", outputs, weights))
    expected = (outputs[:, 0] * weights[:, :1] + outputs[:, 1] * weights[:, 1:2]) + outputs[:, 2] * weights[:, 2:]
    assert torch.equal(reference.combine(outputs, weights), expected)
