"""Routing, experts and their combination on every backend: against the reference, and the same bits in any company."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import reference
from kernels.backend import Backend, Records, Routing
from kernels.quant.formats import FORMATS
from tests.kernels.backends import assert_near, make_backend, make_records


def unpacked(records: Records, expert: int):
    return FORMATS[records.layout.format].unpack(records.slots[expert], records.layout)


def run_experts(
    backend: Backend, x: torch.Tensor, logits: torch.Tensor, records: Records, groups: int = 1
) -> torch.Tensor:
    routing = Routing.of(*reference.route(logits, 3, "softmax"))
    out = torch.full((x.shape[0] * 3, x.shape[1]), float("nan"))
    order = random.Random(groups).sample(routing.experts, len(routing.experts)) if groups > 1 else routing.experts
    for group in range(groups):
        ready = [(expert, expert) for expert in order[group::groups]]
        if ready:
            backend.expert_mlp(x, routing, records, ready, out)
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "hidden", "inner"), [(1, 64, 32), (3, 96, 160), (17, 64, 96), (90, 128, 64)])
def test_each_token_gets_each_of_its_experts_products(
    backend: Backend, format: str, rows: int, hidden: int, inner: int
):
    records = make_records(format, hidden, inner, 6)
    torch.manual_seed(rows)
    x, logits = torch.randn(rows, hidden), torch.randn(rows, 6)
    out = run_experts(backend, x, logits, records)
    ids, _ = reference.route(logits, 3, "softmax")
    expected = torch.empty_like(out)
    for position, expert in enumerate(ids.flatten().tolist()):
        expected[position] = reference.swiglu(x[position // 3], *unpacked(records, expert), format)
    # an inner activation on the other side of a rounding step moves an output by a hundredth of its size at most
    assert_near(out, expected, {"float32": 1e-5, "bf16": 2e-2}.get(format, 3e-2))
    assert (out - expected).norm() <= {"float32": 1e-6}.get(format, 3e-3) * expected.norm()


@pytest.mark.parametrize("format", FORMATS)
def test_experts_products_are_the_same_bits_in_any_company_order_and_number_of_threads(native: str, format: str):
    records = make_records(format, 64, 96, 6)
    torch.manual_seed(0)
    x, logits = torch.randn(40, 64), torch.randn(40, 6)
    whole = run_experts(make_backend(native), x, logits, records).view(40, 3, 64)
    for num_threads in (1, 2, 4):
        backend = make_backend(native, num_threads)
        for groups in (1, 2, 6):
            again = run_experts(backend, x, logits, records, groups)
            assert torch.equal(again.view(40, 3, 64), whole), (num_threads, groups)
        for rows in (1, 2, 7):
            alone = run_experts(backend, x[5 : 5 + rows].contiguous(), logits[5 : 5 + rows].contiguous(), records)
            assert torch.equal(alone.view(rows, 3, 64), whole[5 : 5 + rows]), (num_threads, rows)


def test_one_expert_may_take_all_tokens_and_others_none(backend: Backend):
    records = make_records("int4", 64, 32, 6)
    torch.manual_seed(0)
    x = torch.randn(33, 64)
    logits = torch.tensor([9.0, 8.0, 7.0, 0.0, 0.0, 0.0]).expand(33, 6).contiguous()
    out = run_experts(backend, x, logits, records).view(33, 3, 64)
    for rank in range(3):
        expected = reference.swiglu(x, *unpacked(records, rank), "int4")
        assert (out[:, rank] - expected).norm() <= 3e-3 * expected.norm()


@pytest.mark.parametrize("num_tokens", [9, 100, 3500])  # few; by chunks of tokens; by more chunks than threads
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_combined_at_once_is_what_is_combined_later(backend: Backend, format: str, num_tokens: int):
    records = make_records(format, 64, 96, 6)
    torch.manual_seed(0)
    x, logits, residual = torch.randn(num_tokens, 64), torch.randn(num_tokens, 6), torch.randn(num_tokens, 64)
    routing = Routing.of(*reference.route(logits, 3, "softmax"))
    ready = [(expert, expert) for expert in routing.experts]
    later, outputs = residual.clone(), torch.empty(num_tokens * 3, 64)
    backend.expert_mlp(x, routing, records, ready, outputs)
    backend.combine(outputs, routing.weights, add_to=later)
    for order in (ready, ready[::-1]):
        at_once = residual.clone()
        backend.expert_mlp(x, routing, records, order, torch.empty(num_tokens * 3, 64), add_to=at_once)
        assert torch.equal(at_once, later)
    assert not torch.equal(later, residual)


@pytest.mark.parametrize("routing", ["softmax", "softmax_renormalised", "unweighted"])
@pytest.mark.parametrize(("tokens", "experts", "active"), [(1, 8, 2), (33, 64, 8), (5, 4, 4), (0, 8, 2), (100, 16, 3)])
def test_routing_equals_the_reference(backend: Backend, routing: str, tokens: int, experts: int, active: int):
    torch.manual_seed(1)
    norm, weight, bias = torch.rand(48) + 0.5, torch.randn(experts, 48), torch.randn(experts)
    residual = torch.randn(tokens, 48) * 3
    expected_x = reference.rms_norm(residual, norm, 1e-5)
    logits = reference.linear(expected_x, weight, bias, "float32")
    ids, weights = reference.route(logits, active, routing)
    router = backend.make_linear(weight, bias, "float32")
    x, found = backend.make_router(norm, 1e-5, router, active, routing)(residual)
    torch.testing.assert_close(x, expected_x)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.weights, weights)
    assert found.experts == sorted(set(ids.flatten().tolist()))
    for i, expert in enumerate(found.experts):
        at = found.positions[int(found.row_begin[i]) : int(found.row_begin[i + 1])].tolist()
        assert at == (ids.flatten() == expert).nonzero().flatten().tolist()
        assert found.tokens_of(expert) == [position // active for position in at]


@pytest.mark.parametrize(("tokens", "active", "size"), [(1, 2, 64), (9, 8, 100), (40, 3, 576)])
def test_combine_equals_the_reference(backend: Backend, tokens: int, active: int, size: int):
    torch.manual_seed(0)
    outputs, weights, residual = (
        torch.randn(tokens * active, size),
        torch.rand(tokens, active),
        torch.randn(tokens, size),
    )
    added = residual.clone()
    backend.combine(outputs, weights, add_to=added)
    assert_near(added, residual + reference.combine(outputs.view(tokens, active, size), weights), 1e-6)
