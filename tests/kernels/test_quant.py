"""The contract of every expert format in the table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from kernels.quant.blocked import SPAN, pack_matrix, packed_nbytes, unpack_matrix
from kernels.quant.formats import FORMATS, ExpertWeights, get_format

# Worst error of a weight against the largest of its 256: bf16 has 8 bits; int8 half a step of 127, with a scale rounded
# up to bf16; int4 half of 17 steps at worst, and what a group's best step cuts off. Error of Gaussian weights against
# their norm: a uniform error of one step of int8, and of about a thirteenth of the range of 32 for int4.
MAX_ERROR = {"float32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127 * 1.01, "int4": 0.2}
RMS_ERROR = {"float32": 0.0, "bf16": 0.002, "int8": 0.0075, "int4": 0.085}


def random_weights(hidden: int, inner: int, seed: int = 0) -> ExpertWeights:
    torch.manual_seed(seed)
    return ExpertWeights(torch.randn(inner, hidden), torch.randn(inner, hidden), torch.randn(hidden, inner))


def round_trip(name: str, weights: ExpertWeights) -> ExpertWeights:
    quant_format = FORMATS[name]
    inner, hidden = weights.gate.shape
    layout = quant_format.layout(hidden, inner)
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    quant_format.pack(weights, record)
    return quant_format.unpack(record, layout)


def within_the_bounds(name: str, weight: torch.Tensor, back: torch.Tensor) -> bool:
    spans, error = (F.pad(x, (0, -x.shape[1] % SPAN)).unflatten(-1, (-1, SPAN)) for x in (weight, back - weight))
    worst = (error.abs().amax(-1) <= MAX_ERROR[name] * spans.abs().amax(-1)).all()
    return bool(worst and error.norm() <= RMS_ERROR[name] * weight.norm())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("hidden", "inner"), [(32, 32), (96, 64), (64, 160), (576, 320)])
def test_weights_come_back_within_the_error_of_the_format(name: str, hidden: int, inner: int):
    weights = random_weights(hidden, inner)
    for part, back in zip(weights, round_trip(name, weights), strict=True):
        assert back.shape == part.shape
        assert within_the_bounds(name, part, back)


@pytest.mark.parametrize("name", FORMATS)
def test_records_are_whole_pages_and_their_sections_do_not_overlap(name: str):
    layout = FORMATS[name].layout(96, 64)
    assert layout.nbytes % 4096 == 0
    end = 0
    for section in layout.sections:
        assert section.offset >= end
        assert section.offset % 64 == 0
        end = section.offset + section.nbytes
    assert end <= layout.nbytes


@pytest.mark.parametrize("name", FORMATS)
def test_groups_of_zeros_and_of_extremes_survive(name: str):
    weights = random_weights(64, 64)
    weights.gate[0, :32] = 0.0
    weights.gate[1, :32] *= 1e-9
    weights.up[0] *= 1e4
    back = round_trip(name, weights)
    assert (back.gate[0, :32] == 0).all()
    assert all(part.isfinite().all() for part in back)
    assert (back.up[0] - weights.up[0]).norm() <= RMS_ERROR[name] * weights.up[0].norm()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("hidden", "inner", "what"), [(40, 64, "hidden size"), (64, 40, "expert intermediate size")])
def test_shapes_that_the_kernels_cannot_compute_are_refused(name: str, hidden: int, inner: int, what: str):
    with pytest.raises(ValueError, match=rf"{what} that is a multiple of 32, this model's is 40"):
        FORMATS[name].layout(hidden, inner)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 64), (17, 65), (40, 100), (3, 200)])
def test_a_matrix_of_any_shape_is_padded_with_zeros(name: str, rows: int, columns: int):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    packed = pack_matrix(name, weight)
    assert packed.numel() == packed_nbytes(name, rows, columns)
    padded_rows, padded_columns = -(-rows // 16) * 16, -(-columns // 64) * 64
    whole = unpack_matrix(name, packed, padded_rows, padded_columns)
    assert (whole[rows:] == 0).all()
    if name != "int4":  # a group that is partly padding has what its base and step can give; activations there are 0
        assert (whole[:, columns:] == 0).all()
    bound = MAX_ERROR[name] * weight.abs().max()
    assert ((whole[:rows, :columns] - weight).abs() <= bound).all()
    assert torch.equal(unpack_matrix(name, packed, rows, columns), whole[:rows, :columns])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_zeroed_group_would_not_pass_the_bounds_above(name: str):
    torch.manual_seed(0)
    weight = torch.randn(16, 256)
    back = unpack_matrix(name, pack_matrix(name, weight), 16, 256)
    assert within_the_bounds(name, weight, back)
    for row in range(16):
        zeroed = back.clone()
        zeroed[row, 32:64] = 0.0
        assert not within_the_bounds(name, weight, zeroed)


def test_a_group_s_nibbles_reach_from_its_lowest_to_its_highest_weight():
    weight = torch.linspace(0.5, 2.0, 32).repeat(16, 8)  # all of one sign: half the range would be lost without a base
    back = unpack_matrix("int4", pack_matrix("int4", weight), 16, 256)
    assert (back - weight).abs().max() <= 1.5 / 15 * 0.6


def test_an_unknown_format_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown expert format 'int3'; known: float32, bf16, int8, int4"):
        get_format("int3")
