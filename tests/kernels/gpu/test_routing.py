"""The choice of experts, their rows, norms and sums in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.gpu.experts import combine
from kernels.gpu.grouping import cut_tiles, group_by_expert
from kernels.gpu.norm import rms_norm
from kernels.gpu.router import ROUTINGS, route
from tests.kernels.backends import assert_near


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "experts", "active"), [(1, 8, 2), (33, 60, 6), (5, 4, 4), (70, 128, 8)])
def test_routing_equals_the_reference(routing: str, tokens: int, experts: int, active: int):
    torch.manual_seed(1)
    logits = torch.randn(tokens, experts) * 3
    ids, weights = route(logits, active, routing)
    expected_ids, expected_weights = reference.route(logits, active, routing)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_of_equal_experts_the_lower_is_chosen_first(routing: str):
    logits = torch.tensor([[1.0, 5.0, 5.0, 1.0, 5.0, 1.0], [0.0] * 6])
    ids, weights = route(logits, 4, routing)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    expected = {"softmax": 1 / 6, "softmax_renormalised": 0.25, "unweighted": 1.0}[routing]
    torch.testing.assert_close(weights[1], torch.full((4,), expected))


@pytest.mark.parametrize(("tokens", "experts", "active"), [(1, 8, 2), (40, 5, 3), (300, 7, 4)])
def test_positions_are_grouped_by_expert_in_order(tokens: int, experts: int, active: int):
    torch.manual_seed(0)
    ids = torch.rand(tokens, experts).argsort(-1)[:, :active].int().contiguous()
    ids[ids == 1] = 0  # an expert without tokens
    begin, positions = group_by_expert(ids, experts)
    expected_begin, expected_positions = reference.group_by_expert(ids, experts)
    assert torch.equal(begin, expected_begin)
    assert torch.equal(positions, expected_positions)


@pytest.mark.parametrize("rows_a_tile", [1, 16, 64])
@pytest.mark.parametrize("counts", [[5], [0, 0, 40], [33, 0, 1, 16, 17], [1] * 9, [200, 0, 0]])
def test_tiles_cover_each_chosen_segment_once(counts: list[int], rows_a_tile: int):
    begin = torch.tensor([0, *counts]).cumsum(0).int()
    for chosen in (torch.arange(len(counts)).int(), torch.tensor([len(counts) - 1, 0]).int()):
        expected = reference.cut_tiles(begin, chosen, rows_a_tile)
        if len(counts) == 1 and len(chosen) == 2:
            continue  # a segment is chosen once
        tiles = cut_tiles(begin, chosen, sum(counts), rows_a_tile)
        assert torch.equal(tiles[: len(expected)], expected)
        assert (tiles[len(expected) :, 0] == -1).all()


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 576), (70, 37)])
def test_rms_norm_equals_the_reference(rows: int, size: int):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, size) * 3, torch.randn(size)
    assert_near(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), 1e-5)


@pytest.mark.parametrize(("tokens", "active", "size"), [(1, 2, 64), (9, 8, 100), (70, 3, 1300)])
def test_combine_equals_the_reference(tokens: int, active: int, size: int):
    torch.manual_seed(0)
    outputs, weights = torch.randn(tokens * active, size), torch.rand(tokens, active)
    residual = torch.randn(tokens, size)
    added = residual.clone()
    combine(outputs, weights, added)
    assert_near(added, residual + reference.combine(outputs.view(tokens, active, size), weights), 1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="top-7 does not fit a router of 6"):
        route(torch.randn(2, 6), 7, "softmax")
    with pytest.raises(ValueError, match="unknown routing 'best'"):
        route(torch.randn(2, 6), 2, "best")
    with pytest.raises(ValueError, match="expected contiguous"):
        group_by_expert(torch.zeros(4, 2, dtype=torch.int64), 6)
    with pytest.raises(ValueError, match="expected shape"):
        rms_norm(torch.randn(2, 6), torch.randn(5), 1e-5)
    with pytest.raises(ValueError, match="expected shape"):
        combine(torch.randn(5, 6), torch.rand(2, 3), torch.randn(2, 6))
