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


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_paged_attention_equals_torchs_on_any_mix_of_chunks_and_decode_rows(kv_heads: int):
    torch.manual_seed(0)
    contexts, rows = [1, 9, 30, 17, 5], [1, 1, 30, 6, 0 + 5]
    kv_cache = torch.randn(2, 128, kv_heads, 16)
    slots = list(torch.randperm(128)[: sum(contexts)].split(contexts))
    query = torch.randn(sum(rows), 4, 16)
    ends = torch.tensor(rows).cumsum(0).tolist()
    spans = [(end - num, end) for end, num in zip(ends, rows, strict=True)]
    out = reference.paged_attention(query, kv_cache, spans, slots, 0.25)
    for (start, end), context, at in zip(spans, contexts, slots, strict=True):
        k, v = (kv_cache[i, at].transpose(0, 1).repeat_interleave(4 // kv_heads, 0) for i in (0, 1))
        mask = torch.ones(end - start, context, dtype=torch.bool).tril(context - (end - start))
        expected = F.scaled_dot_product_attention(query[start:end].transpose(0, 1), k, v, attn_mask=mask, scale=0.25)
        torch.testing.assert_close(out[start:end], expected.transpose(0, 1))


def test_append_kv_writes_the_named_slots_only():
    kv_cache = torch.zeros(2, 8, 2, 4)
    key, value = torch.ones(3, 2, 4), torch.full((3, 2, 4), 2.0)
    reference.append_kv(kv_cache, key, value, torch.tensor([6, 0, 3]))
    assert kv_cache[0].sum((1, 2)).tolist() == [8, 0, 0, 8, 0, 0, 8, 0]
    assert kv_cache[1].sum((1, 2)).tolist() == [16, 0, 0, 16, 0, 0, 16, 0]


def test_routing_takes_the_best_and_weighs_them_as_the_family_wants():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    probs = logits.softmax(-1)[0]
    ids, weights = reference.route_softmax(logits, 2, renormalise=False)
    assert ids.tolist() == [[1, 3]]
    torch.testing.assert_close(weights[0], probs[[1, 3]])
    _, weights = reference.route_softmax(logits, 2, renormalise=True)
    torch.testing.assert_close(weights[0], probs[[1, 3]] / probs[[1, 3]].sum())
    ids, weights = reference.route_unweighted(logits, 3)
    assert ids.tolist() == [[1, 3, 2]]
    assert weights.tolist() == [[1.0, 1.0, 1.0]]


def test_combine_is_the_weighted_sum_in_routing_order():
    torch.manual_seed(0)
    outputs, weights = torch.randn(5, 3, 8), torch.rand(5, 3)
    torch.testing.assert_close(reference.combine(outputs, weights), torch.einsum("tkh,tk->th", outputs, weights))
    expected = (outputs[:, 0] * weights[:, :1] + outputs[:, 1] * weights[:, 1:2]) + outputs[:, 2] * weights[:, 2:]
    assert torch.equal(reference.combine(outputs, weights), expected)
