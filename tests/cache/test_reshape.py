from __future__ import annotations

import numpy as np
import pytest

from cache.reshape import reshape
from tests.cache.synthetic_traces import local_trace


def trace():
    return local_trace(0, [12, 9], num_layers=4, num_experts=16, active=4, num_prompt=3)


@pytest.mark.parametrize("shape", [(4, 16, 4), (4, 4, 2), (10, 32, 6), (3, 64, 8), (9, 8, 8), (4, 16, 16)])
def test_every_token_has_so_many_distinct_experts_in_every_layer(shape: tuple[int, int, int]):
    num_layers, num_experts, num_active = shape
    made = reshape(trace(), *shape)
    assert made.ids.shape == (21, num_layers, num_active)
    assert (made.num_experts, len(made.layers), made.num_requests) == (num_experts, num_layers, 2)
    assert made.ids.max() < num_experts
    assert all(len(set(row)) == num_active for layer in made.ids.swapaxes(0, 1) for row in layer.tolist())
    assert made.seq_off.tolist() == trace().seq_off.tolist()
    assert made.num_prompt.tolist() == trace().num_prompt.tolist()


def test_its_own_shape_changes_nothing():
    assert np.array_equal(reshape(trace(), 4, 16, 4).ids, trace().ids)


def test_folding_keeps_the_order_of_the_best():
    made, original = reshape(trace(), 4, 4, 2), trace()
    for token, layer in ((0, 0), (7, 2), (20, 3)):
        groups = list(dict.fromkeys((original.ids[token, layer] // 4).tolist()))
        assert made.ids[token, layer].tolist()[: len(groups)] == groups[:2]


def test_spreading_routes_each_lot_as_a_layer_of_the_trace():
    made, original = reshape(trace(), 4, 32, 8), trace()
    lots = [made.ids[5, 1][made.ids[5, 1] < 16], made.ids[5, 1][made.ids[5, 1] >= 16] - 16]
    assert lots[0].tolist() == original.ids[5, 1].tolist()
    assert lots[1].tolist() == original.ids[5, 3].tolist()


def test_further_layers_are_those_of_the_trace_half_a_request_later():
    made, original = reshape(trace(), 8, 16, 4), trace()
    assert np.array_equal(made.ids[0, 4], original.ids[6, 0])
    assert np.array_equal(made.ids[12, 4], original.ids[16, 0])  # of the second request's own tokens
    assert np.array_equal(made.ids[11, 5], original.ids[5, 1])


@pytest.mark.parametrize("shape", [(4, 24, 2), (4, 16, 17), (4, 16, 0)])
def test_what_cannot_be_folded_is_refused(shape: tuple[int, int, int]):
    with pytest.raises(ValueError, match="cannot be"):
        reshape(trace(), *shape)
