"""Experts computed from cache slots in the interpreter: against the reference, and the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.backend import Records, Routing
from kernels.gpu.backend import TritonBackend
from kernels.gpu.configs import Tile
from kernels.gpu.experts import ExpertTiles, expert_down, expert_gate_up
from kernels.gpu.grouping import cut_tiles
from kernels.gpu.rounding import round_rows
from kernels.quant.formats import FORMATS
from tests.kernels.backends import assert_near, make_records
from tests.kernels.test_experts import unpacked

ACTIVE = 3


def run(backend: TritonBackend, x: torch.Tensor, logits: torch.Tensor, records: Records, groups: int = 1):
    routing = Routing.of(*reference.route(logits, ACTIVE, "softmax"))
    out = torch.full((x.shape[0] * ACTIVE, x.shape[1]), float("nan"))
    for group in range(groups):
        ready = [(expert, expert) for expert in routing.experts[group::groups]]
        if ready:
            backend.expert_mlp(x, routing, records, ready, out)
    return out.view(x.shape[0], ACTIVE, x.shape[1])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "hidden", "inner"), [(1, 64, 32), (17, 96, 160)])
def test_each_token_gets_each_of_its_experts_products(
    backend: TritonBackend, format: str, rows: int, hidden: int, inner: int
):
    records = make_records(format, hidden, inner, 6)
    torch.manual_seed(rows)
    x, logits = torch.randn(rows, hidden), torch.randn(rows, 6)
    out = run(backend, x, logits, records).flatten(0, 1)
    ids, _ = reference.route(logits, ACTIVE, "softmax")
    expected = torch.empty_like(out)
    for position, expert in enumerate(ids.flatten().tolist()):
        expected[position] = reference.swiglu(x[position // ACTIVE], *unpacked(records, expert), format)
    # an inner activation on the other side of a rounding step moves an output by a hundredth of its size at most
    assert_near(out, expected, {"float32": 1e-5, "bf16": 2e-2}.get(format, 3e-2))
    assert (out - expected).norm() <= {"float32": 1e-6}.get(format, 3e-3) * expected.norm()


@pytest.mark.parametrize("format", FORMATS)
def test_both_halves_equal_their_references_and_every_tile_gives_the_same_bits(format: str):
    records = make_records(format, 96, 64, 3)
    torch.manual_seed(0)
    counts, hidden, inner = [5, 0, 18], 96, 64
    begin = torch.tensor([0, *counts]).cumsum(0).int()
    positions = torch.randperm(23).int()  # one expert a token
    x = torch.randn(23, hidden)
    order = [2, 0]  # as they came; expert 1 has no rows
    offsets = torch.tensor([(records.addresses[e] - records.addresses[0]) // 64 for e in order])
    found = []
    for tile in (Tile(16, 64, 4, 1), Tile(32, 128, 4, 1), Tile(64, 256, 4, 1)):
        tiles = cut_tiles(begin, torch.tensor(order).int(), 23, tile.rows)
        work = ExpertTiles(tiles, offsets, positions)
        units = expert_gate_up(round_rows(x, format), work, records.slots[0], records.layout, 1, tile)
        out = torch.full((23, hidden), float("nan"))
        expert_down(round_rows(units, format), work, records.slots[0], records.layout, tile, out)
        found.append((units, out))
    for units, out in found[1:]:
        assert torch.equal(units, found[0][0])
        assert torch.equal(out, found[0][1])
    units, out = found[0]
    for expert in order:
        rows = slice(int(begin[expert]), int(begin[expert + 1]))
        tokens = positions[rows].long()
        gate, up, down = unpacked(records, expert)
        assert_near(units[rows], reference.expert_gate_up(x[tokens], gate, up, format), 1e-4)
        assert_near(out[tokens], reference.expert_down(units[rows], down, format), 1e-4)
    assert units.shape == (23, inner)


@pytest.mark.parametrize("format", FORMATS)
def test_experts_products_are_the_same_bits_in_any_company_and_order(backend: TritonBackend, format: str):
    records = make_records(format, 64, 96, 6)
    torch.manual_seed(0)
    x, logits = torch.randn(45, 64), torch.randn(45, 6)  # 22 rows an expert: the variant for many
    whole = run(backend, x, logits, records)
    assert torch.equal(run(backend, x, logits, records, groups=3), whole)
    for rows in (slice(5, 6), slice(7, 14)):  # the variant for few
        alone = run(backend, x[rows].contiguous(), logits[rows].contiguous(), records)
        assert torch.equal(alone, whole[rows]), rows


def test_one_expert_may_take_all_tokens_and_others_none(backend: TritonBackend):
    records = make_records("int4", 64, 32, 6)
    torch.manual_seed(0)
    x = torch.randn(33, 64)
    logits = torch.tensor([9.0, 8.0, 7.0, 0.0, 0.0, 0.0]).expand(33, 6).contiguous()
    out = run(backend, x, logits, records)
    for rank in range(ACTIVE):
        expected = reference.swiglu(x, *unpacked(records, rank), "int4")
        assert (out[:, rank] - expected).norm() <= 3e-3 * expected.norm()


def test_what_is_combined_at_once_is_what_is_combined_later(backend: TritonBackend):
    records = make_records("int8", 64, 96, 6)
    torch.manual_seed(0)
    x, logits, residual = torch.randn(9, 64), torch.randn(9, 6), torch.randn(9, 64)
    routing = Routing.of(*reference.route(logits, ACTIVE, "softmax"))
    ready = [(expert, expert) for expert in routing.experts]
    later, at_once, outputs = residual.clone(), residual.clone(), torch.empty(27, 64)
    backend.expert_mlp(x, routing, records, ready[:2], outputs)
    backend.expert_mlp(x, routing, records, ready[2:], outputs)
    backend.combine(outputs, routing.weights, add_to=later)
    backend.expert_mlp(x, routing, records, ready, torch.empty(27, 64), add_to=at_once)
    assert torch.equal(at_once, later)
    assert not torch.equal(later, residual)


def test_what_does_not_fit_is_refused(backend: TritonBackend):
    records = make_records("int8", 64, 32, 6)
    routing = Routing.of(*reference.route(torch.randn(4, 6), ACTIVE, "softmax"))
    with pytest.raises(ValueError, match="does not fit the routing"):
        backend.expert_mlp(torch.randn(4, 64), routing, records, [(0, 0)], torch.empty(4, 64))
    with pytest.raises(ValueError, match="were not routed to"):
        backend.expert_mlp(torch.randn(4, 64), routing, records, [(6, 0)], torch.empty(12, 64))
    work = ExpertTiles(torch.zeros(1, 3).int(), torch.zeros(1).long(), torch.zeros(4).int())
    tile, x = Tile(16, 64, 4, 1), torch.randn(4, 64)
    with pytest.raises(ValueError, match="bf16 rows of 64 do not fit"):
        expert_gate_up(round_rows(x, "bf16"), work, records.slots[0], records.layout, 1, tile)
    with pytest.raises(ValueError, match="aligned to 64 bytes"):
        expert_gate_up(round_rows(x, "int8"), work, records.slots[0][1:], records.layout, 1, tile)
    with pytest.raises(ValueError, match="expected shape"):
        expert_down(round_rows(x[:, :32], "int8"), work, records.slots[0], records.layout, tile, torch.empty(5, 64))
