"""The contract of every expert format in the table."""

from __future__ import annotations

import pytest
import torch

from kernels.quant.blocked import GROUP_SIZE, pack_matrix, packed_nbytes, unpack_matrix
from kernels.quant.formats import FORMATS, ExpertWeights, get_format

# worst relative step of each format against a group's largest weight, and typical relative error of Gaussian weights
MAX_ERROR = {"float32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127 * 1.01, "int4": 1.01 / 8}
RMS_ERROR = {"float32": 0.0, "bf16": 0.002, "int8": 0.006, "int4": 0.1}


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


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("hidden", "inner"), [(32, 32), (96, 64), (64, 160)])
def test_weights_come_back_within_the_error_of_the_format(name: str, hidden: int, inner: int):
    weights = random_weights(hidden, inner)
    for part, back in zip(weights, round_trip(name, weights), strict=True):
        assert back.shape == part.shape
        groups, error = part.unflatten(-1, (-1, 32)), (back - part).unflatten(-1, (-1, 32))
        assert (error.abs().amax(-1) <= MAX_ERROR[name] * groups.abs().amax(-1)).all()
        assert error.norm() <= RMS_ERROR[name] * part.norm()


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
def test_a_matrix_of_any_shape_is_padded_with_exact_zeros(name: str, rows: int, columns: int):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    packed = pack_matrix(name, weight)
    assert packed.numel() == packed_nbytes(name, rows, columns)
    padded_rows, padded_columns = -(-rows // 16) * 16, -(-columns // 64) * 64
    whole = unpack_matrix(name, packed, padded_rows, padded_columns)
    assert (whole[rows:] == 0).all()
    assert (whole[:, columns:] == 0).all()
    bound = MAX_ERROR[name] * weight.abs().max()
    assert ((whole[:rows, :columns] - weight).abs() <= bound).all()
    assert torch.equal(unpack_matrix(name, packed, rows, columns), whole[:rows, :columns])


def test_a_zeroed_group_would_not_pass_the_bounds_above():
    weight = torch.randn(16, 64)
    for name in ("int8", "int4"):
        back = unpack_matrix(name, pack_matrix(name, weight), 16, 64)
        back[3, :GROUP_SIZE] = 0.0
        groups, error = weight.unflatten(-1, (-1, 32)), (back - weight).unflatten(-1, (-1, 32))
        assert not (error.abs().amax(-1) <= MAX_ERROR[name] * groups.abs().amax(-1)).all()


def test_an_unknown_format_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown expert format 'int3'; known: float32, bf16, int8, int4"):
        get_format("int3")
