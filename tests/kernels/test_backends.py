"""Products, norms and dense layers of every backend against the reference, and what a backend refuses."""

from __future__ import annotations

import random
import re

import pytest
import torch

from kernels import reference
from kernels.backend import BACKENDS, Backend, Records, Routing, choose_backend
from kernels.quant.blocked import pack_in_torch, pack_matrix, unpack_matrix
from kernels.torch_backend import TorchBackend
from tests.kernels.backends import NATIVE, assert_near, make_backend, make_records, make_sequences, make_shape

DENSE_FORMATS = ("float32", "bf16", "int8", "int4")

# largest error against the reference, relative to the output's root mean square: sums in another order in float32,
# and an activation that falls on the other side of a rounding step
TOLERANCE = {"float32": 1e-5, "bf16": 2e-3, "int8": 2e-3, "int4": 2e-3}


@pytest.mark.parametrize("format", DENSE_FORMATS)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 16, 64), (3, 40, 100), (17, 96, 576), (64, 33, 32), (0, 16, 64)]
)
def test_linear_equals_the_reference(backend: Backend, format: str, rows: int, outputs: int, inputs: int):
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(rows, inputs)
    stored = unpack_matrix(format, pack_matrix(format, weight), outputs, inputs)
    for b in (None, bias):
        out = backend.make_linear(weight, b, format)(x)
        assert out.shape == (rows, outputs)
        if rows:
            assert_near(out, reference.linear(x, stored, b, format), TOLERANCE[format])
    residual = torch.randn(rows, outputs)
    expected = residual + backend.make_linear(weight, None, format)(x)
    added = residual.clone()
    assert backend.make_linear(weight, None, format)(x, add_to=added) is added
    torch.testing.assert_close(added, expected)


@pytest.mark.parametrize("format", DENSE_FORMATS)
def test_a_row_has_the_same_bits_in_any_company_and_with_any_number_of_threads(native: str, format: str):
    torch.manual_seed(0)
    weight, x = torch.randn(200, 320), torch.randn(61, 320)
    linear = make_backend(native).make_linear(weight, None, format)
    whole = linear(x)
    for num_threads in (1, 3, 4):
        make_backend(native, num_threads)
        for num_rows in (1, 2, 5, 8, 9, 31):
            start = random.Random(num_rows).randrange(61 - num_rows)
            part = linear(x[start : start + num_rows].contiguous())
            assert torch.equal(part, whole[start : start + num_rows]), (num_threads, num_rows)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_span_with_an_outlier_keeps_the_precision_of_its_other_inputs(backend: Backend, format: str):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 600), torch.randn(20, 600)
    x[3:18:5, 300] = 300.0  # rows 3, 8 and 13, in the second of three spans
    weight[:, 300] = 0.0
    stored = unpack_matrix(format, pack_matrix(format, weight), 48, 600)
    exact = torch.nn.functional.linear(x, stored)
    linear = backend.make_linear(weight, None, format)
    out = linear(x)
    assert_near(out, reference.linear(x, stored, None, format), 2e-3)
    assert ((out - exact).norm(dim=1) <= 0.01 * exact.norm(dim=1)).all()  # with 8 bits it would be 0.4
    for rows in (slice(3, 4), slice(2, 5), slice(4, 20)):
        if backend.name == "native":
            assert torch.equal(linear(x[rows].contiguous()), out[rows])


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 64), (33, 288), (48, 600), (100, 2048)])
def test_native_packing_gives_the_same_bits_as_torch(native: str, format: str, rows: int, columns: int):
    make_backend(native)
    torch.manual_seed(rows)
    weight = torch.randn(rows, columns) * torch.logspace(-6, 3, rows)[:, None]
    weight[0, :32] = 0.0
    weight[rows // 2] = 0.0
    weight[-1, ::7] *= 30.0
    assert torch.equal(pack_matrix(format, weight), pack_in_torch(format, weight))


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 576), (70, 48), (5, 37), (200, 256)])
def test_rms_norm_equals_the_reference(backend: Backend, rows: int, size: int):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, size) * 3, torch.randn(size)
    assert_near(backend.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), 1e-5)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "hidden", "inner"), [(1, 64, 100), (9, 96, 64), (40, 576, 33)])
def test_a_dense_layer_equals_the_reference(backend: Backend, rows: int, hidden: int, inner: int, normed: bool):
    torch.manual_seed(0)
    gate, up, down = torch.randn(inner, hidden), torch.randn(inner, hidden), torch.randn(hidden, inner)
    x, residual, norm = torch.randn(rows, hidden), torch.randn(rows, hidden), torch.rand(hidden) / hidden**0.5
    gate_up = backend.make_linear(torch.cat((gate, up)), None, "float32")
    mlp = backend.make_mlp(norm if normed else None, 1e-5, gate_up, backend.make_linear(down, None, "float32"))
    added = residual.clone()
    mlp(x, added)
    inputs = reference.rms_norm(x, norm, 1e-5) if normed else x
    assert_near(added, residual + reference.swiglu(inputs, gate, up, down, "float32"), 1e-5)
    in_place = x.clone()
    mlp(in_place, in_place)
    assert_near(in_place, x + reference.swiglu(inputs, gate, up, down, "float32"), 1e-5)


def test_the_backend_is_chosen_by_name_and_the_slow_one_loudly(monkeypatch, caplog):
    assert choose_backend("reference", 1).name == "reference"
    with caplog.at_level("INFO"):
        assert choose_backend("auto", 1).name == "native"
    assert re.search(r"native kernels: (amx|avx512|avx2|portable), 1 threads", caplog.text)
    with pytest.raises(ValueError, match="unknown kernels 'fast'; known: auto, native, reference, triton"):
        choose_backend("fast", 1)

    def not_built(num_threads: int) -> Backend:
        raise RuntimeError("the native kernels were not built")

    monkeypatch.setitem(BACKENDS, "native", not_built)
    assert choose_backend("auto", 1).name == "reference"
    assert "SLOW: running on the reference kernels (the native kernels were not built)" in caplog.text


@pytest.mark.parametrize("name", NATIVE[:1])
def test_wrong_shapes_and_strides_are_refused_before_they_reach_memory(name: str):
    backend = make_backend(name)
    linear = backend.make_linear(torch.randn(32, 64), None, "int8")
    with pytest.raises(ValueError, match="does not fit a matrix"):
        linear(torch.randn(2, 32))
    with pytest.raises(ValueError, match="expected contiguous"):
        linear(torch.randn(64, 2).T)
    with pytest.raises(ValueError, match="expected contiguous"):
        linear(torch.randn(2, 64, dtype=torch.float64))
    records = make_records("int8", 64, 32, 6)
    routing = Routing.of(*reference.route(torch.randn(4, 6), 3, "softmax"))
    with pytest.raises(ValueError, match="does not fit the routing"):
        backend.expert_mlp(torch.randn(4, 64), routing, records, [(0, 0)], torch.empty(4, 64))
    with pytest.raises(ValueError, match="were not routed to"):
        backend.expert_mlp(torch.randn(4, 64), routing, records, [(6, 0)], torch.empty(12, 64))
    with pytest.raises(ValueError, match="shorter than a record"):
        Records(records.layout, [records.slots[0][:100]])
    router = backend.make_linear(torch.randn(6, 64), None, "float32")
    with pytest.raises(ValueError, match="top-7 does not fit a router of 6"):
        backend.make_router(torch.ones(64), 1e-5, router, 7, "softmax")
    with pytest.raises(ValueError, match="does not fit a router of 64 inputs"):
        backend.make_router(torch.ones(64), 1e-5, router, 3, "softmax")(torch.randn(2, 32))
    with pytest.raises(ValueError, match="do not fit down of 64 inputs"):
        backend.make_mlp(None, 1e-5, router, router)
    with pytest.raises(TypeError, match="made by another backend"):
        backend.make_mlp(None, 1e-5, TorchBackend().make_linear(torch.randn(6, 64), None, "float32"), router)
    shape = make_shape(2, 1, 16)
    qkv, output = (backend.make_linear(torch.randn(size), None, "float32") for size in ((64, 48), (48, 32)))
    with pytest.raises(ValueError, match="does not fit AttentionShape"):
        backend.make_attention(shape, torch.ones(48), output, output)
    attention = backend.make_attention(shape, torch.ones(48), qkv, output)
    sequences = make_sequences([1], [1], 2)
    keys, values = torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)
    with pytest.raises(ValueError, match=r"keys \(2, 1, 8, 16\)"):
        attention(torch.randn(1, 48), keys[:, :, :8], values, sequences)
    with pytest.raises(ValueError, match="does not fit the sequences"):
        attention(torch.randn(2, 48), keys, values, sequences)
