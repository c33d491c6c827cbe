"""The contract of every expert format in the table."""

from __future__ import annotations

import pytest
import torch

from kernels.quant.formats import FORMATS, get_format
from kernels.quant.record import ExpertWeights

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
    return quant_format.unpack(record, layout, torch.float32)


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


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize(("hidden", "inner", "what"), [(40, 64, "hidden size"), (64, 40, "expert intermediate size")])
def test_shapes_that_are_not_whole_groups_are_refused_with_the_cure(name: str, hidden: int, inner: int, what: str):
    with pytest.raises(ValueError, match=rf"{what} that is a multiple of 32, this model's is 40; use --experts bf16"):
        FORMATS[name].layout(hidden, inner)


def test_an_unknown_format_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown expert format 'int3'; known: float32, bf16, int8, int4"):
        get_format("int3")
