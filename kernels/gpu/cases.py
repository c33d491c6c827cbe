"""Every kernel as it is launched for a model of ordinary shape, on tensors without memory: what is compiled ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.backend import AttentionShape
from kernels.gpu import experts, grouping, kv, linear, norm, repack, rounding, router
from kernels.gpu.attention import AttentionTile, AttentionWork, paged_attention
from kernels.gpu.configs import VARIANTS, Configs
from kernels.gpu.launch import Launch, recording
from kernels.gpu.matrix import PackedMatrix, PackedShape
from kernels.quant.formats import FORMATS

# Qwen3-30B-A3B's
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, ACTIVE = 2048, 768, 32, 4, 128, 128, 8
ROWS = {"decode": 16, "prefill": 2048}
CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Case:
    """One launch, and the work of one of its programs: the bytes that it moves to and from memory, and operations."""

    kernel: str
    format: str
    variant: str
    tile: str  # rows x outputs, warps, stages
    launch: Launch
    nbytes: int = 0
    num_operations: int = 0


def all_cases(configs: Configs) -> Iterator[Case]:
    """Of every kernel, format and variant, with the tiles of one configuration."""
    for format in FORMATS:
        for variant in VARIANTS:
            yield from _products(configs, format, variant)
    for dtype in ("bf16", "float32"):
        for variant in ("decode", "prefill", "prefill, window"):
            yield from _attention(configs, dtype, variant)
    for format in FORMATS:
        matrix = PackedMatrix(shape := PackedShape(format, HIDDEN, HIDDEN), _meta(shape.nbytes, dtype=torch.uint8))
        yield from _recorded(format, "", partial(repack.repack, matrix, torch.bfloat16))
        for is_dense in (False, True):
            variant = "dense" if is_dense else "experts"
            rows = _meta(16, 2 * HIDDEN if is_dense else HIDDEN)
            if not (format == "float32" and not is_dense):
                yield from _recorded(
                    format,
                    variant,
                    partial(rounding.round_rows, rows, format, is_dense=is_dense, is_gated=is_dense),
                )
    yield from _small()


def _products(configs: Configs, format: str, variant: str) -> Iterator[Case]:
    num_rows = ROWS[variant]
    each = 1 if variant == "decode" else num_rows * ACTIVE / EXPERTS
    layout = FORMATS[format].layout(HIDDEN, INNER)
    tokens = _rounded(format, num_rows, HIDDEN, is_dense=True)
    shape = PackedShape(format, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
    matrix = PackedMatrix(shape, _meta(shape.nbytes, dtype=torch.uint8))
    tile = configs.tile("linear", format, num_rows)
    yield from _recorded(format, variant, lambda: linear.linear(tokens, matrix, None, tile))
    tile = configs.tile("expert_gate_up", format, each)
    arena = _meta(layout.nbytes, dtype=torch.uint8)
    positions = num_rows * ACTIVE
    work = experts.ExpertTiles(
        _meta(EXPERTS, 3, dtype=torch.int32),
        _meta(EXPERTS, dtype=torch.int64),
        _meta(positions, dtype=torch.int32),
    )
    sparse = _rounded(format, num_rows, HIDDEN)
    yield from _recorded(
        format,
        variant,
        lambda: experts.expert_gate_up(sparse, work, arena, layout, ACTIVE, tile),
    )
    down = configs.tile("expert_down", format, each)
    inner = _rounded(format, positions, INNER)
    outputs = _meta(positions, HIDDEN)
    yield from _recorded(format, variant, lambda: experts.expert_down(inner, work, arena, layout, down, outputs))


def _attention(configs: Configs, dtype_name: str, variant: str) -> Iterator[Case]:
    dtype = torch.bfloat16 if dtype_name == "bf16" else torch.float32
    is_decode = variant == "decode"
    num_rows = ROWS["decode" if is_decode else "prefill"]
    keys = _meta(1024, KV_HEADS, HEAD_DIM, 16, dtype=dtype)
    values = _meta(1024, KV_HEADS, 16, HEAD_DIM, dtype=dtype)
    chosen, row_begin, context, block_begin, blocks = (_meta(n, dtype=torch.int32) for n in (16, 17, 16, 17, 1024))
    num_parts = CONTEXT // 512 if is_decode else 0
    tiles = _meta(16, 3, dtype=torch.int32)
    work = AttentionWork(tiles, chosen, row_begin, context, block_begin, blocks, num_parts)
    query = _meta(num_rows, HEADS, HEAD_DIM, dtype=dtype)
    out = _meta(num_rows, HEADS, HEAD_DIM)
    positions = _meta(num_rows, dtype=torch.int32)
    tile = AttentionTile(**configs.attention[dtype_name])
    yield from _recorded(
        dtype_name,
        variant,
        lambda: paged_attention(
            query, keys, values, work, positions, _shape("head"), tile, out, 1024 if "window" in variant else None
        ),
    )


def _small() -> Iterator[Case]:
    int32 = torch.int32
    yield from _recorded("float32", "", lambda: norm.rms_norm(_meta(16, HIDDEN), _meta(HIDDEN), 1e-6))
    yield from _recorded("float32", "", lambda: router.route(_meta(16, EXPERTS), ACTIVE, "softmax"))
    yield from _recorded("", "", lambda: grouping.group_by_expert(_meta(16, 8, dtype=int32), 128))
    begin, chosen = _meta(EXPERTS + 1, dtype=int32), _meta(64, dtype=int32)
    yield from _recorded("", "", lambda: grouping.cut_tiles(begin, chosen, 2048, 16))
    yield from _recorded(
        "float32",
        "",
        lambda: experts.combine(_meta(16 * ACTIVE, HIDDEN), _meta(16, ACTIVE), _meta(16, HIDDEN)),
    )
    for qk_norm in ("none", "head", "full"):
        qkv = _meta(16, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        keys = _meta(64, KV_HEADS, HEAD_DIM, 16, dtype=torch.bfloat16)
        values = _meta(64, KV_HEADS, 16, HEAD_DIM, dtype=torch.bfloat16)
        at = _meta(16, dtype=int32)
        yield from _recorded(
            "bf16",
            f"qk_norm {qk_norm}",
            partial(kv.append_kv, qkv, _shape(qk_norm), at, at, keys, values),
        )


def _recorded(format: str, variant: str, call: Callable[[], object]) -> Iterator[Case]:
    with recording() as launches:
        call()
    for launch in launches:
        name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
        constants, options = launch.constants, launch.options
        sizes = "x".join(str(constants[size]) for size in ("ROWS", "OUTPUTS") if size in constants)
        tile = f"{sizes or '-'}, {options['num_warps']}w, {options['num_stages']}s"
        yield Case(name, format, variant, tile, launch, *_work_of(name, format, launch))


def _work_of(name: str, format: str, launch: Launch) -> tuple[int, int]:
    """Bytes and operations (a product's two count as two) of one program of a product, or of one block of 64 keys."""
    constants = launch.constants
    if name in ("linear", "expert_gate_up", "expert_down"):
        num_inputs = INNER if name == "expert_down" else HIDDEN
        rows, outputs = constants["ROWS"], constants["OUTPUTS"]
        weights = PackedShape(format, outputs, num_inputs).nbytes
        each = {"float32": 4, "bf16": 2}.get(format, 1)
        written = outputs // 2 if name == "expert_gate_up" else outputs
        return weights + rows * (num_inputs * each + 4 * written), 2 * rows * outputs * num_inputs
    if name == "paged_attention":
        each = 2 if format == "bf16" else 4
        return 2 * 64 * HEAD_DIM * each, 4 * constants["ROWS"] * 64 * HEAD_DIM
    return 0, 0


def _shape(qk_norm: str) -> AttentionShape:
    sizes = {"none": None, "head": (HEAD_DIM, HEAD_DIM), "full": (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)}[qk_norm]
    q_norm, k_norm = (None, None) if sizes is None else (_meta(sizes[0]), _meta(sizes[1]))
    cos, sin = _meta(CONTEXT, HEAD_DIM), _meta(CONTEXT, HEAD_DIM)
    return AttentionShape(HEADS, KV_HEADS, HEAD_DIM, qk_norm, 1e-6, None, q_norm, k_norm, cos, sin)


def _rounded(format: str, num_rows: int, num_inputs: int, *, is_dense: bool = False) -> rounding.RoundedRows:
    with recording():
        return rounding.round_rows(_meta(num_rows, num_inputs), format, is_dense=is_dense)


def _meta(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")
