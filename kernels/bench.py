"""Speed of the CPU kernels beside the roofs and the alternatives of the same run: `python -m kernels.bench`.

Every figure is a median over rounds in which all contenders take turns, so that what else the machine does hits all of
them. Experts are taken in turn from a set larger than the last-level cache, as a layer after layer does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from kernels.backend import AttentionShape, Draw, Records, Routing, Sequences
from kernels.cpu.native import NativeBackend
from kernels.quant.blocked import packed_nbytes
from kernels.quant.formats import FORMATS, ExpertWeights

SHAPES = {  # hidden, intermediate, experts, active
    "olmoe": (2048, 1024, 64, 8),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "mixtral": (4096, 14336, 8, 2),
    "demo": (576, 32, 32, 24),
}
HEADS = {  # query heads, kv heads, head size
    "olmoe": (16, 16, 128),
    "qwen3-30b-a3b": (32, 4, 128),
    "mixtral": (32, 8, 128),
    "demo": (9, 3, 64),
}
VOCAB_SIZES = {"olmoe": 50304, "qwen3-30b-a3b": 151936, "mixtral": 32000, "demo": 49152}
SAMPLING = {  # temperature, top_k, top_p
    "likeliest": (0.0, 0, 1.0),
    "temperature": (1.0, 0, 1.0),
    "top_p": (1.0, 0, 0.9),
    "top_k": (1.0, 40, 1.0),
}
ATTENTION = ((1, 1024, 1), (1, 8192, 1), (32, 1024, 1), (1, 512, 512))  # sequences, context, new rows of each
WORKING_SET_NBYTES = 512 * 1024**2


@dataclass
class Contender:
    """One thing to be timed: `run` does it once, moving `nbytes` of weights for `flops`."""

    name: str
    run: Callable[[], object]
    nbytes: float
    flops: float


def measure(contenders: list[Contender], rounds: int, min_s: float = 0.02) -> dict[str, float]:
    """Median seconds per run of each contender, taken in turns."""
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    repeats = {}
    for c in contenders:
        c.run()
        started = time.perf_counter()
        c.run()
        repeats[c.name] = max(1, int(min_s / max(time.perf_counter() - started, 1e-7)))
    for _ in range(rounds):
        for c in contenders:
            started = time.perf_counter()
            for _ in range(repeats[c.name]):
                c.run()
            times[c.name].append((time.perf_counter() - started) / repeats[c.name])
    return {name: statistics.median(values) for name, values in times.items()}


def expert_contender(
    backend: NativeBackend, format: str, shape: tuple[int, int, int, int], rows: int
) -> tuple[Contender, int]:
    """The expert MLP, added up, with `rows` rows for each active expert; and how many records it turns through."""
    hidden, inner, _, active = shape
    layout = FORMATS[format].layout(hidden, inner)
    num_records = max(active, min(256, WORKING_SET_NBYTES // layout.nbytes))
    memory = torch.zeros(num_records * layout.nbytes + 4096, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 4096 :]
    slots = list(memory[: num_records * layout.nbytes].view(num_records, -1))
    records = Records(layout, slots)
    gate, up, down = (torch.randn(shape) * 0.02 for shape in ((inner, hidden), (inner, hidden), (hidden, inner)))
    FORMATS[format].pack(ExpertWeights(gate, up, down), slots[0])
    for slot in slots[1:]:
        slot.copy_(slots[0])
    x = torch.randn(rows, hidden)
    ids = torch.arange(active, dtype=torch.int32).expand(rows, active).contiguous()  # each expert has all the rows
    routing = Routing.of(ids, torch.ones(rows, active))
    out = torch.empty(rows * active, hidden)
    residual = torch.zeros(rows, hidden)
    groups = cycle([list(range(i, i + active)) for i in range(0, num_records - active + 1, active)])

    def run() -> None:
        backend.expert_mlp(x, routing, records, list(enumerate(next(groups))), out, add_to=residual)

    products = 3 * hidden * inner * active
    weights_nbytes = sum(section.nbytes for section in layout.sections) * active
    return Contender(f"foregate {format} expert", run, weights_nbytes, 2.0 * products * rows), num_records


def linear_contender(backend: NativeBackend, format: str, shape: tuple[int, int, int, int], rows: int) -> Contender:
    """One dense product, of the very size of the alternatives' below."""
    hidden, _, _, _ = shape
    outputs = dense_outputs(shape)
    num_copies = max(1, min(4, WORKING_SET_NBYTES // 2 // (outputs * hidden)))
    weight = torch.randn(outputs, hidden) * hidden**-0.5
    linears = cycle([backend.make_linear(weight, None, format) for _ in range(num_copies)])
    x = torch.randn(rows, hidden)
    nbytes = packed_nbytes(format, outputs, hidden)
    return Contender(f"foregate {format} linear", lambda: next(linears)(x), nbytes, 2.0 * rows * outputs * hidden)


def dense_outputs(shape: tuple[int, int, int, int]) -> int:
    """As many as gate, up and down of one token's experts have together."""
    _, inner, _, active = shape
    return 3 * inner * active // 64 * 64


def attention_contender(
    backend: NativeBackend, dtype: torch.dtype, heads: tuple[int, int, int], num_seqs: int, context: int, rows: int
) -> Contender:
    """The last `rows` tokens of each of `num_seqs` sequences of `context` tokens. Its nbytes are those of the KV read.

    Projections are part of the call; with 64 hidden components they are about a hundredth of it.
    """
    num_heads, num_kv_heads, dim = heads
    angles = torch.rand(context, dim)
    shape = AttentionShape(num_heads, num_kv_heads, dim, "none", 1e-5, None, None, None, angles.cos(), angles.sin())
    qkv = backend.make_linear(torch.randn((num_heads + 2 * num_kv_heads) * dim, 64) / 8, None, "bf16")
    output = backend.make_linear(torch.randn(64, num_heads * dim), None, "bf16")
    attention = backend.make_attention(shape, torch.ones(64), qkv, output)
    blocks_each = -(-context // 16)
    order = torch.randperm(num_seqs * blocks_each).int()
    keys = torch.randn(num_seqs * blocks_each, num_kv_heads, dim, 16).to(dtype)
    values = torch.randn(num_seqs * blocks_each, num_kv_heads, 16, dim).to(dtype)
    positions = torch.arange(context - rows, context)
    slots = order.view(num_seqs, -1)[:, positions // 16] * 16 + positions % 16
    sequences = Sequences(
        positions=positions.repeat(num_seqs).int(),
        slots=slots.flatten().int(),
        row_begin=torch.arange(0, num_seqs * rows + 1, rows).int(),
        context=torch.full((num_seqs,), context).int(),
        block_begin=torch.arange(0, len(order) + 1, blocks_each).int(),
        blocks=order,
    )
    residual = torch.randn(num_seqs * rows, 64)
    nbytes = 2.0 * num_seqs * context * num_kv_heads * dim * dtype.itemsize
    pairs = num_seqs * rows * (context - (rows - 1) / 2)
    return Contender(
        f"attention {str(dtype).removeprefix('torch.')} {num_seqs} x {rows} of {context}",
        lambda: attention(residual, keys, values, sequences),
        nbytes,
        4.0 * pairs * num_heads * dim,
    )


def choose_contenders(backend: NativeBackend, vocab_size: int, rows: int) -> Iterator[Contender]:
    """Tokens of logits as spread as a model's, and torch's sampling of them all at once."""
    logits = torch.randn(rows, vocab_size) * 3
    for name, (temperature, top_k, top_p) in SAMPLING.items():
        draws = [Draw((i + 0.5) / rows, temperature, top_k, top_p, 0.0) for i in range(rows)]

        def ours(draws: list[Draw] = draws) -> object:
            return backend.choose(logits.unbind(), draws)

        def of_torch(temperature: float = temperature, top_k: int = top_k, top_p: float = top_p) -> object:
            if temperature == 0.0:
                return logits.argmax(-1).tolist()
            values, ids = logits / temperature, None
            if top_k:
                values, ids = values.topk(top_k)
            elif top_p < 1.0:
                values, ids = values.sort(descending=True)
            probs = values.softmax(-1)
            if top_p < 1.0:
                probs = torch.where(probs.cumsum(-1) - probs < top_p, probs, 0.0)
            chosen = probs.multinomial(1)
            return (chosen if ids is None else ids.gather(1, chosen)).tolist()

        yield Contender(f"choose {name}", ours, logits.nbytes, 0.0)
        yield Contender(f"torch {name}", of_torch, logits.nbytes, 0.0)


def alternatives(shape: tuple[int, int, int, int], rows: int) -> Iterator[Contender]:
    """torch's own products of the same size as one call's: [rows, H] x [H, 3 * I * active] in one piece."""
    hidden = shape[0]
    outputs = dense_outputs(shape)
    num_copies = max(1, min(8, WORKING_SET_NBYTES // 2 // (outputs * hidden)))
    flops = 2.0 * rows * hidden * outputs
    x = torch.randn(rows, hidden)

    def turn(weights: list[Tensor], product: Callable[[Tensor], object]) -> Callable[[], object]:
        order = cycle(weights)
        return lambda: product(next(order))

    x16 = x.bfloat16()
    dense = [torch.randn(outputs, hidden).bfloat16() for _ in range(max(1, num_copies // 2))]
    yield Contender(
        "torch bf16 linear", turn(dense, lambda w: torch.nn.functional.linear(x16, w)), outputs * hidden * 2, flops
    )
    del dense

    if hidden % 32 == 0:
        q = torch.randint(0, 16, (outputs, hidden), dtype=torch.int32)
        scales = torch.ones(hidden // 32, outputs, 2).bfloat16()
        packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1) for _ in range(num_copies * 2)]
        del q
        yield Contender(
            "torch int4pack",
            turn(packed, lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x16, w, 32, scales)),
            outputs * hidden * (0.5 + 4 / 32),
            flops,
        )
        del packed

    torch.backends.quantized.engine = "onednn"
    warnings.simplefilter("ignore")  # deprecated, but still the door to oneDNN's int8
    weight = torch.quantize_per_tensor(torch.randn(outputs, hidden), 0.05, 0, torch.qint8)
    prepacked = [torch.ops.quantized.linear_prepack(weight, None) for _ in range(num_copies)]
    yield Contender(
        "oneDNN int8 linear",
        turn(prepacked, lambda w: torch.ops.quantized.linear_dynamic(x, w)),
        outputs * hidden,
        flops,
    )


def expert_alternatives(shape: tuple[int, int, int, int], rows: int) -> Iterator[Contender]:
    """The very work of `expert_contender` with torch's products, an expert after the other: two products, SiLU, sum."""
    hidden, inner, _, active = shape
    num_copies = max(1, min(8, WORKING_SET_NBYTES // 4 // (3 * hidden * inner * active)))
    num_weights = 3 * hidden * inner * active
    flops = 2.0 * rows * num_weights
    x = torch.randn(rows, hidden)

    def turn(
        gate_up: Tensor, down: Tensor, pack: Callable[[Tensor], object], product: Callable[[Tensor, Any], Tensor]
    ) -> Callable[[], object]:
        layers = cycle([[(pack(gate_up), pack(down)) for _ in range(active)] for _ in range(num_copies)])

        def run() -> None:
            total = torch.zeros(rows, hidden)
            for first, second in next(layers):
                gate, up = product(x, first).chunk(2, dim=-1)
                total += product(torch.nn.functional.silu(gate) * up, second)

        return run

    weights = torch.randn(2 * inner, hidden) * 0.02, torch.randn(hidden, inner) * 0.02
    bf16 = turn(*weights, lambda w: w.bfloat16(), lambda x, w: torch.nn.functional.linear(x.bfloat16(), w))
    yield Contender("torch bf16 experts", bf16, num_weights * 2, flops)
    int8 = turn(
        *weights,
        lambda w: torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(w, 0.05, 0, torch.qint8), None),
        torch.ops.quantized.linear_dynamic,
    )
    yield Contender("oneDNN int8 experts", int8, num_weights, flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--kernel", choices=["expert", "linear", "attention", "choose", "all"], default="expert")
    parser.add_argument("--format", choices=[*FORMATS, "all"], default="all")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256,512")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", default="", help="amx, avx512, avx2 or portable [default: the best here]")
    parser.add_argument("--no-alternatives", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backend = NativeBackend(args.threads, args.isa)
    memory = torch.ones(WORKING_SET_NBYTES, dtype=torch.uint8)  # not zeros: unwritten pages are all one page
    read = Contender("streaming read", lambda: backend.read(memory), memory.numel(), 0.0)
    kernels = ["expert", "linear", "attention", "choose"] if args.kernel == "all" else [args.kernel]
    formats = [f for f in FORMATS if args.format in (f, "all")]
    if not args.json:
        print(f"{backend.isa}, {args.threads} threads; medians of {args.rounds} rounds")
        print(f"{'shape':14} {'rows':>4}  {'what':32} {'us':>10} {'GB/s':>7} {'GFLOP/s':>8} {'of read':>8}")
    for shape_name, shape in SHAPES.items():
        if args.shape not in (shape_name, "all"):
            continue
        for rows in map(int, args.rows.split(",")) if {"expert", "linear"} & set(kernels) else ():
            contenders = [read]
            if "expert" in kernels:
                contenders += [expert_contender(backend, f, shape, rows)[0] for f in formats]
            if "linear" in kernels:
                contenders += [linear_contender(backend, f, shape, rows) for f in formats if f != "int4"]
            if not args.no_alternatives:
                contenders += alternatives(shape, rows)
            if "expert" in kernels and not args.no_alternatives:
                contenders += expert_alternatives(shape, rows)
            _report(contenders, args.rounds, shape_name, rows, as_json=args.json)
        for rows in map(int, args.rows.split(",")) if "choose" in kernels else ():
            contenders = [read, *choose_contenders(backend, VOCAB_SIZES[shape_name], rows)]
            _report(contenders, args.rounds, shape_name, rows, as_json=args.json)
        if "attention" in kernels:
            for num_seqs, context, rows in ATTENTION:
                contenders = [read]
                for dtype in (torch.float32, torch.bfloat16):
                    at = (num_seqs, context, rows)
                    contenders.append(attention_contender(backend, dtype, HEADS[shape_name], *at))
                _report(contenders, args.rounds, shape_name, rows, as_json=args.json)


def _report(contenders: list[Contender], rounds: int, shape_name: str, rows: int, *, as_json: bool) -> None:
    """Measure and print; the first contender is the streaming read."""
    seconds = measure(contenders, rounds)
    roof = contenders[0].nbytes / seconds[contenders[0].name]
    for c in contenders:
        s = seconds[c.name]
        row = {
            "shape": shape_name,
            "rows": rows,
            "what": c.name,
            "us": s * 1e6,
            "gb_per_s": c.nbytes / s / 1e9,
            "gflop_per_s": c.flops / s / 1e9,
            "of_streaming_read": c.nbytes / s / roof,
        }
        if as_json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"{shape_name:14} {rows:4}  {c.name:32} {row['us']:10.1f} {row['gb_per_s']:7.1f} "
                f"{row['gflop_per_s']:8.0f} {row['of_streaming_read']:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
