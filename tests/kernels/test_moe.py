from __future__ import annotations

import random

import pytest
import torch

from kernels import reference
from kernels.moe import expert_mlp, group_by_expert
from kernels.quant.formats import FORMATS
from tests.kernels.test_quant import random_weights

HIDDEN, INNER, NUM_EXPERTS, NUM_ACTIVE = 64, 96, 6, 3


def make_experts(name: str):
    quant_format = FORMATS[name]
    layout = quant_format.layout(HIDDEN, INNER)
    records = []
    for expert in range(NUM_EXPERTS):
        records.append(torch.zeros(layout.nbytes, dtype=torch.uint8))
        quant_format.pack(random_weights(HIDDEN, INNER, seed=expert), records[-1])
    return quant_format, layout, records


def random_routing(num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:NUM_ACTIVE] for _ in range(num_tokens)])


def test_group_by_expert_names_every_position_once():
    topk_ids = random_routing(9)
    positions = group_by_expert(topk_ids)
    assert sorted(i for at in positions.values() for i in at.tolist()) == list(range(27))
    for expert, at in positions.items():
        assert (topk_ids.flatten()[at] == expert).all()
        assert at.tolist() == sorted(at.tolist())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 3, 17])
def test_each_token_gets_each_of_its_experts_products(name: str, num_tokens: int):
    quant_format, layout, records = make_experts(name)
    topk_ids = random_routing(num_tokens)
    x = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(1))
    out = torch.full((num_tokens, NUM_ACTIVE, HIDDEN), float("nan"))
    positions = group_by_expert(topk_ids)
    expert_mlp(x, positions, [(e, records[e]) for e in positions], quant_format, layout, out)
    for token in range(num_tokens):
        for rank in range(NUM_ACTIVE):
            weights = quant_format.unpack(records[topk_ids[token, rank]], layout, torch.float32)
            torch.testing.assert_close(out[token, rank], reference.swiglu(x[token], *weights), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_the_order_and_grouping_in_which_experts_arrive_does_not_change_a_bit(name: str):
    quant_format, layout, records = make_experts(name)
    topk_ids, x = random_routing(13), torch.randn(13, HIDDEN, generator=torch.Generator().manual_seed(1))
    positions = group_by_expert(topk_ids)
    rng, results = random.Random(0), []
    for num_groups in (1, 2, 6):
        order = rng.sample(list(positions), len(positions))
        out = torch.empty(13, NUM_ACTIVE, HIDDEN)
        for group in range(num_groups):
            expert_mlp(x, positions, [(e, records[e]) for e in order[group::num_groups]], quant_format, layout, out)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_an_output_that_does_not_fit_is_refused():
    quant_format, layout, _ = make_experts("bf16")
    with pytest.raises(ValueError, match="does not fit"):
        expert_mlp(torch.zeros(2, HIDDEN), {}, [], quant_format, layout, torch.zeros(3, NUM_ACTIVE, HIDDEN))
