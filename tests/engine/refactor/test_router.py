from __future__ import annotations

import torch

from engine.refactor.plan import SplitSettings
from engine.refactor.router import expert_gram, fit_router, left_out_error, ridge_router, router_logits

SETTINGS = SplitSettings(num_experts=4, shared_size=8, num_active=2)


def test_ridge_recovers_a_linear_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 12, generator=generator) + 1
    weight, bias = torch.randn(4, 12, generator=generator), torch.randn(4, generator=generator)
    found_weight, found_bias = ridge_router(inputs, inputs @ weight.T + bias)
    torch.testing.assert_close(found_weight, weight, atol=0.02, rtol=0.02)
    torch.testing.assert_close(found_bias, bias, atol=0.05, rtol=0.05)


def test_the_gram_gives_the_exact_error_of_leaving_experts_out() -> None:
    generator = torch.Generator().manual_seed(0)
    neurons, down = torch.randn(30, 40, generator=generator), torch.randn(12, 40, generator=generator)
    scale = torch.rand(30, generator=generator)
    permutation = torch.randperm(40, generator=generator)
    gram = expert_gram(neurons, down, scale, permutation, SETTINGS)
    logits = torch.randn(30, 4, generator=generator)
    errors = left_out_error(logits, gram, SETTINGS.num_active)
    for token in range(30):
        left_out = logits[token].argsort()[:2]
        columns = torch.cat([permutation[8:].view(4, 8)[expert] for expert in left_out])
        error = (neurons[token, columns] * scale[token]) @ down[:, columns].T
        torch.testing.assert_close(errors[token], error.square().sum(), atol=1e-4, rtol=1e-4)


def test_a_fitted_router_leaves_out_far_less_than_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 16, generator=generator)
    gates = torch.randn(40, 16, generator=generator)
    gates[8:] = torch.randn(4, 16, generator=generator).repeat_interleave(8, 0) + 0.3 * gates[8:]
    neurons = torch.relu(inputs @ gates.T)
    down = torch.randn(16, 40, generator=generator)
    gram = expert_gram(neurons, down, torch.ones(4000), torch.arange(40), SETTINGS)
    weight, bias = fit_router(inputs[:3000], gram[:3000])
    unseen, chance = inputs[3000:], torch.rand(1000, 4, generator=generator)
    by_router = left_out_error(router_logits(unseen, weight, bias), gram[3000:], 2).mean()
    by_chance = left_out_error(chance, gram[3000:], 2).mean()
    by_oracle = left_out_error(gram[3000:].diagonal(dim1=1, dim2=2), gram[3000:], 2).mean()
    assert by_router < by_oracle + 0.2 * (by_chance - by_oracle)
