"""Rounding, dense products and repacking in the interpreter: the reference's numbers, the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.gpu.configs import Tile
from kernels.gpu.linear import linear
from kernels.gpu.matrix import PackedMatrix, PackedShape
from kernels.gpu.repack import repack
from kernels.gpu.rounding import RoundedRows, round_rows
from kernels.quant.blocked import pack_matrix, packed_nbytes, unpack_matrix
from kernels.quant.formats import FORMATS
from tests.kernels.backends import assert_near

CPU = torch.device("cpu")
TOLERANCE = {"float32": 1e-5, "bf16": 2e-3, "int8": 2e-3, "int4": 2e-3}
TILES = (Tile(16, 64, 4, 1), Tile(32, 128, 4, 1), Tile(64, 256, 8, 1))


@pytest.mark.parametrize("is_dense", [False, True])
def test_rows_are_rounded_to_the_references_bytes(is_dense: bool):
    torch.manual_seed(0)
    x = torch.randn(7, 600)
    x[2:5, 300] = 80.0  # outliers in the second span
    x[6] = 0.0
    rows = round_rows(x, "int8", is_dense=is_dense)
    high, low, scales = reference.quantise_rows(x, is_dense=is_dense)
    assert torch.equal(rows.values[:, :600], high)
    assert not rows.values[:, 600:].any()
    torch.testing.assert_close(rows.scales, scales, rtol=1e-6, atol=0)
    if is_dense:
        assert torch.equal(rows.low[:, :600], low)
        assert rows.is_low.tolist() == [[0, int(row in (2, 3, 4)), 0] for row in range(7)]
        assert low[3].any()
    else:
        assert rows.low is None


@pytest.mark.parametrize("format", FORMATS)
def test_a_gated_row_is_the_first_half_through_silu_times_the_second(format: str):
    torch.manual_seed(0)
    x = torch.randn(5, 2 * 72)
    rows = round_rows(x, format, is_gated=True, is_dense=True)
    values = rows.values.float()
    if rows.scales is not None:
        values = (values + rows.low.float() / 256) * rows.scales
    gate, up = x.chunk(2, -1)
    expected = reference.round_activations(torch.nn.functional.silu(gate) * up, format, is_dense=True)
    assert_near(values[:, :72], expected, {"float32": 1e-6}.get(format, 2e-2))
    assert not values[:, 72:].any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 16, 64), (3, 40, 100), (19, 96, 576)])
def test_linear_equals_the_reference(format: str, rows: int, outputs: int, inputs: int):
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(rows, inputs)
    matrix = PackedMatrix.pack(weight, format, CPU)
    stored = unpack_matrix(format, pack_matrix(format, weight), outputs, inputs)
    rounded = round_rows(x, format, is_dense=True)
    expected = reference.linear(x, stored, bias, format)
    out = linear(rounded, matrix, bias, TILES[0])
    assert_near(out, expected, TOLERANCE[format])
    residual = torch.randn(rows, outputs)
    added = residual.clone()
    assert linear(rounded, matrix, None, TILES[1], added) is added
    assert_near(added, residual + reference.linear(x, stored, None, format), TOLERANCE[format])


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_in_any_company_and_tile(format: str):
    torch.manual_seed(0)
    weight, x = torch.randn(150, 320), torch.randn(21, 320)
    x[4, 70] = 100.0  # one row with low bytes must not change the others
    matrix = PackedMatrix.pack(weight, format, CPU)
    whole = linear(round_rows(x, format, is_dense=True), matrix, None, TILES[0])
    for tile, rows in zip(TILES, (slice(0, 21), slice(3, 6), slice(17, 18)), strict=True):
        part = linear(round_rows(x[rows].contiguous(), format, is_dense=True), matrix, None, tile)
        assert torch.equal(part, whole[rows]), (tile, rows)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_span_with_an_outlier_keeps_the_precision_of_its_other_inputs(format: str):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 600), torch.randn(4, 600)
    x[1:3, 300] = 300.0
    weight[:, 300] = 0.0
    stored = unpack_matrix(format, pack_matrix(format, weight), 48, 600)
    out = linear(round_rows(x, format, is_dense=True), PackedMatrix.pack(weight, format, CPU), None, TILES[0])
    exact = torch.nn.functional.linear(x, stored)
    assert ((out - exact).norm(dim=1) <= 0.01 * exact.norm(dim=1)).all()  # with 8 bits it would be 0.4


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (40, 100), (130, 576)])
def test_repacked_rows_are_the_weights_that_the_record_stands_for(format: str, outputs: int, inputs: int):
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs)
    matrix = PackedMatrix.pack(weight, format, CPU)
    stored = unpack_matrix(format, pack_matrix(format, weight), outputs, inputs)
    assert torch.equal(repack(matrix, torch.float32), stored)
    assert torch.equal(repack(matrix, torch.bfloat16), stored.bfloat16())


def test_a_packed_shape_is_as_large_as_what_is_packed():
    for format in FORMATS:
        for outputs, inputs in ((16, 64), (40, 100), (2048, 768)):
            assert PackedShape(format, outputs, inputs).nbytes == packed_nbytes(format, outputs, inputs)


def test_what_does_not_fit_is_refused():
    matrix = PackedMatrix.pack(torch.randn(32, 64), "int8", CPU)
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="int8 rows of 32 do not fit"):
        linear(round_rows(x[:, :32], "int8", is_dense=True), matrix, None, TILES[0])
    with pytest.raises(ValueError, match="bf16 rows of 64 do not fit"):
        linear(round_rows(x, "bf16", is_dense=True), matrix, None, TILES[0])
    with pytest.raises(ValueError, match="rounded with is_dense"):
        linear(round_rows(x, "int8"), matrix, None, TILES[0])
    with pytest.raises(ValueError, match="expected shape"):
        linear(round_rows(x, "int8", is_dense=True), matrix, torch.randn(31), TILES[0])
    with pytest.raises(ValueError, match="expected contiguous"):
        linear(round_rows(x, "int8", is_dense=True), matrix, None, TILES[0], torch.empty(32, 2).T)
    with pytest.raises(ValueError, match="expected float32 rows"):
        round_rows(x.double(), "int8")
    with pytest.raises(ValueError, match="contiguous bytes"):
        PackedMatrix(matrix.shape, matrix.data[:-1])
    with pytest.raises(ValueError, match="cannot repack"):
        repack(matrix, torch.float16)
    assert isinstance(round_rows(x, "float32"), RoundedRows)
