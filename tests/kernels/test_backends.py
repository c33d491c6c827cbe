"""Every backend against the reference, and its promise of the same bits whatever else is in the call."""

from __future__ import annotations

import random
import re

import pytest
import torch

from kernels import reference
from kernels.backend import BACKENDS, AttentionShape, Backend, Records, Routing, Sequences, choose_backend
from kernels.quant.blocked import pack_in_torch, pack_matrix, unpack_matrix
from kernels.quant.formats import FORMATS
from kernels.torch_backend import TorchBackend
from tests.kernels.test_quant import random_weights

ISAS = ("amx", "avx512", "avx2", "portable")
NATIVE = [f"native-{isa}" for isa in ISAS]
DENSE_FORMATS = ("float32", "bf16", "int8", "int4")

# largest error against the reference, relative to the output's root mean square: sums in another order in float32,
# and an activation that falls on the other side of a rounding step
TOLERANCE = {"float32": 1e-5, "bf16": 2e-3, "int8": 2e-3, "int4": 2e-3}


def make_backend(name: str, num_threads: int = 2) -> Backend:
    if not name.startswith("native-"):
        return TorchBackend()
    from kernels.cpu.native import NativeBackend

    try:
        return NativeBackend(num_threads, name.removeprefix("native-"))
    except RuntimeError as error:
        if "this CPU cannot run" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(params=["reference", *NATIVE])
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> str:
    make_backend(request.param)
    return str(request.param)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    scale = expected.square().mean().sqrt()
    assert scale > 0
    error = (actual - expected).abs().max() / scale
    assert error <= tolerance, f"error {error:.2e} is above {tolerance:.2e}"


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


def make_records(format: str, hidden: int, inner: int, num_experts: int) -> Records:
    layout = FORMATS[format].layout(hidden, inner)
    slots = []
    for expert in range(num_experts):
        aligned = torch.zeros(layout.nbytes + 4096, dtype=torch.uint8)
        record = aligned[-aligned.data_ptr() % 4096 :][: layout.nbytes]
        FORMATS[format].pack(random_weights(hidden, inner, seed=expert), record)
        slots.append(record)
    return Records(layout, slots)


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


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_combined_at_once_is_what_is_combined_later(backend: Backend, format: str):
    records = make_records(format, 64, 96, 6)
    torch.manual_seed(0)
    x, logits, residual = torch.randn(9, 64), torch.randn(9, 6), torch.randn(9, 64)
    routing = Routing.of(*reference.route(logits, 3, "softmax"))
    ready = [(expert, expert) for expert in routing.experts]
    later, outputs = residual.clone(), torch.empty(27, 64)
    backend.expert_mlp(x, routing, records, ready, outputs)
    backend.combine(outputs, routing.weights, add_to=later)
    at_once = residual.clone()
    backend.expert_mlp(x, routing, records, ready, torch.empty(27, 64), add_to=at_once)
    assert torch.equal(at_once, later)
    assert not torch.equal(at_once, residual)


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


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 576), (70, 48), (5, 37), (200, 256)])
def test_rms_norm_equals_the_reference(backend: Backend, rows: int, size: int):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, size) * 3, torch.randn(size)
    assert_near(backend.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), 1e-5)


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


def make_sequences(context: list[int], rows: list[int], num_blocks: int, seed: int = 0) -> Sequences:
    """Sequences whose last `rows` tokens are new, in shuffled blocks."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    positions, slots, row_begin, block_begin, blocks = [], [], [0], [0], []
    for length, num_rows in zip(context, rows, strict=True):
        mine = [order.pop() for _ in range(-(-length // 16))]
        for p in range(length - num_rows, length):
            positions.append(p)
            slots.append(mine[p // 16] * 16 + p % 16)
        blocks += mine
        row_begin.append(len(positions))
        block_begin.append(len(blocks))
    return Sequences(
        *(torch.tensor(v, dtype=torch.int32) for v in (positions, slots, row_begin, context, block_begin, blocks))
    )


def make_shape(heads: int, kv_heads: int, dim: int, qk_norm: str = "none", clip: float | None = None) -> AttentionShape:
    torch.manual_seed(heads)
    sizes = {"none": (0, 0), "head": (dim, dim), "full": (heads * dim, kv_heads * dim)}[qk_norm]
    angles = torch.rand(512, dim // 2) * 6
    angles = torch.cat((angles, angles), -1)
    q_norm, k_norm = (torch.rand(size) + 0.5 if size else None for size in sizes)
    return AttentionShape(heads, kv_heads, dim, qk_norm, 1e-5, clip, q_norm, k_norm, angles.cos(), angles.sin())


def attend(backend: Backend, shape: AttentionShape, x: torch.Tensor, keys, values, sequences: Sequences):
    """The attention of a layer whose q, k and v are the components of x, and whose output is the residual's first."""
    width, attended = x.shape[1], shape.num_heads * shape.head_dim
    qkv, output = torch.eye(width), torch.eye(width, attended)
    linears = [backend.make_linear(weight, None, "float32") for weight in (qkv, output)]
    residual = x * 1e-2  # far below the output; the norm makes it x again
    before = residual.clone()
    backend.make_attention(shape, torch.ones(width), *linears)(residual, keys, values, sequences)
    assert torch.equal(residual[:, attended:], before[:, attended:])
    return residual[:, :attended]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "qk_norm", "clip"),
    [
        (4, 4, 16, "none", None),
        (4, 2, 64, "head", None),
        (8, 1, 32, "full", 0.8),
        (6, 3, 80, "none", 0.5),
        (2, 1, 128, "head", None),
    ],
)
def test_attention_equals_the_reference_on_any_mix_of_chunks_and_decode_rows(
    backend: Backend, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, qk_norm: str, clip: float | None
):
    shape = make_shape(heads, kv_heads, dim, qk_norm, clip)
    context, rows = [1, 300, 40, 33, 16, 129], [1, 1, 40, 17, 16, 3]
    sequences = make_sequences(context, rows, 64)
    torch.manual_seed(1)
    qkv = torch.randn(sum(rows), (heads + 2 * kv_heads) * dim)
    keys, values = torch.randn(64, kv_heads, dim, 16).to(dtype), torch.randn(64, kv_heads, 16, dim).to(dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = attend(TorchBackend(), shape, qkv, expected_keys, expected_values, sequences)
    out = attend(backend, shape, qkv, keys, values, sequences)
    assert_near(out, expected, 1e-4 if dtype == torch.float32 else 2e-2)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(keys, expected_keys, atol=bound, rtol=bound)
    torch.testing.assert_close(values, expected_values, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_gives_a_row_the_same_bits_in_any_chunk_company_and_number_of_threads(
    native: str, dtype: torch.dtype
):
    shape = make_shape(4, 2, 64)
    torch.manual_seed(2)
    qkv = torch.randn(90, 8 * 64)
    keys = torch.full((32, 2, 64, 16), float("nan"), dtype=dtype)  # what was never written must not matter
    values = torch.full((32, 2, 16, 64), float("nan"), dtype=dtype)
    whole_sequence = make_sequences([90], [90], 32)
    whole = attend(make_backend(native), shape, qkv, keys, values, whole_sequence)
    assert whole.isfinite().all()
    for num_threads in (1, 3):
        backend = make_backend(native, num_threads)
        for chunk in (1, 7, 64):
            for start in range(0, 90, chunk):
                end = min(90, start + chunk)
                part = make_sequences([end], [end - start], 32)
                blocks = whole_sequence.blocks[: len(part.blocks)].contiguous()
                part.blocks = blocks
                part.slots = whole_sequence.slots[start:end].contiguous()
                out = attend(backend, shape, qkv[start:end].contiguous(), keys, values, part)
                assert torch.equal(out, whole[start:end]), (num_threads, chunk, start)


def test_the_backend_is_chosen_by_name_and_the_slow_one_loudly(monkeypatch, caplog):
    assert choose_backend("reference", 1).name == "reference"
    with caplog.at_level("INFO"):
        assert choose_backend("auto", 1).name == "native"
    assert re.search(r"native kernels: (amx|avx512|avx2|portable), 1 threads", caplog.text)
    with pytest.raises(ValueError, match="unknown kernels 'fast'; known: auto, native, reference"):
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
