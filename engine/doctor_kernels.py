"""Are kernels right: what they compute beside the reference, a row's bits in any company, and whether they compile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import AttentionShape, Backend, Records, Routing, Sequences
from kernels.quant.formats import FORMATS, ExpertWeights

MAX_ERROR = 0.02  # of the largest output: kernels round activations, and add, in other orders
ARCHES = ("sm_80", "sm_90", "sm_100", "sm_120")
_COMPILED = ("expert_gate_up", "int4", "decode")
_HIDDEN, _INNER, _NUM_EXPERTS, _NUM_ACTIVE = 256, 128, 4, 2
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 64
_NUM_ROWS = 40  # of which some tiles are full, and experts have more rows than a tile of decode
_FEW_ROWS = 3
_CONTEXT = 560  # longer than what attention takes at a time


def errors(backend: Backend, reference: Backend) -> Iterator[tuple[str, float]]:
    """Of each kernel and format: the largest difference over the largest output."""
    for format in FORMATS:
        yield format, _error(_experts(backend, format, _FEW_ROWS), _experts(reference, format, _FEW_ROWS))
    for format in FORMATS:
        yield f"dense {format}", _error(_dense(backend, format, _FEW_ROWS), _dense(reference, format, _FEW_ROWS))
    yield "attention", _error(_attention(backend, _FEW_ROWS), _attention(reference, _FEW_ROWS))
    yield "router", _error(_router(backend, _FEW_ROWS), _router(reference, _FEW_ROWS))


def depends_on_company(backend: Backend) -> Iterator[str]:
    """The kernels that give a row other bits among few rows than among many."""
    for format in FORMATS:
        if not torch.equal(_experts(backend, format, _FEW_ROWS), _experts(backend, format, _NUM_ROWS)[:_FEW_ROWS]):
            yield format
        if not torch.equal(_dense(backend, format, _FEW_ROWS), _dense(backend, format, _NUM_ROWS)[:_FEW_ROWS]):
            yield f"dense {format}"
    if not torch.equal(_attention(backend, 1), _attention(backend, _NUM_ROWS)[-1:]):
        yield "attention"


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one architecture; `why`: it could not be compiled."""

    arch: str
    registers: int = 0
    spilled_nbytes: int = 0
    why: str = ""


def compiled(arches: Sequence[str], gpu: str = "") -> list[Compiled]:
    """The expert kernel of a decode step, for GPUs that need not be here. Takes some seconds each, the first time.

    `gpu`: whose tuned tiles are taken. Raises `RuntimeError` where Triton is not there, or only interprets.
    """
    try:
        from kernels.gpu.cases import all_cases
        from kernels.gpu.compile import compile_launch, resources_of
        from kernels.gpu.configs import load_configs
        from kernels.gpu.launch import INTERPRETED
    except ImportError as error:
        raise RuntimeError(f"Triton is not here: {error}") from error
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    found = []
    for arch in arches:
        cases = all_cases(load_configs(gpu, arch))
        case = next(case for case in cases if (case.kernel, case.format, case.variant) == _COMPILED)
        try:
            resources = resources_of(compile_launch(case.launch, arch))
            found.append(Compiled(arch, resources.registers, resources.spilled_nbytes))
        except Exception as error:  # whatever the compiler stumbles over is the finding
            lines = str(error).strip().splitlines()
            found.append(Compiled(arch, why=f"{type(error).__name__}: {lines[-1] if lines else ''}"))
    return found


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def _experts(backend: Backend, format: str, num_rows: int) -> Tensor:
    """[rows, k * H] of the first rows, on the CPU, wherever the backend computes."""
    generator = torch.Generator().manual_seed(0)
    layout = FORMATS[format].layout(_HIDDEN, _INNER)
    shapes = ((_INNER, _HIDDEN), (_INNER, _HIDDEN), (_HIDDEN, _INNER))
    slots = []
    for _ in range(_NUM_EXPERTS):
        slots.append(torch.zeros(layout.nbytes, dtype=torch.uint8))
        weights = ExpertWeights(*(torch.randn(shape, generator=generator) * 0.05 for shape in shapes))
        FORMATS[format].pack(weights, slots[-1])
    chosen = [torch.randperm(_NUM_EXPERTS, generator=generator)[:_NUM_ACTIVE] for _ in range(_NUM_ROWS)]
    ids = torch.stack(chosen)[:num_rows].int().to(backend.device)
    x = _random(_NUM_ROWS, _HIDDEN, seed=1)[:num_rows].to(backend.device)
    routing = Routing.of(ids, torch.ones(ids.shape, device=backend.device))
    arena = torch.cat(slots).to(backend.device)
    records = Records(layout, list(arena.view(_NUM_EXPERTS, -1)))
    outputs = torch.zeros(routing.num_positions, _HIDDEN, device=backend.device)
    backend.expert_mlp(x, routing, records, [(expert, expert) for expert in routing.experts], outputs)
    return outputs.cpu().view(num_rows, -1)


def _dense(backend: Backend, format: str, num_rows: int) -> Tensor:
    linear = backend.make_linear(_random(_INNER, _HIDDEN) * 0.05, _random(_INNER, seed=2), format)
    return linear(_random(_NUM_ROWS, _HIDDEN, seed=1)[:num_rows].to(backend.device)).cpu()


def _router(backend: Backend, num_rows: int) -> Tensor:
    """[rows, k + H]: weights in the order of the experts, and the normed rows."""
    linear = backend.make_linear(_random(_NUM_EXPERTS, _HIDDEN), None, "float32")
    router = backend.make_router(1.0 + 0.1 * _random(_HIDDEN, seed=3), 1e-6, linear, _NUM_ACTIVE, "softmax")
    x, routing = router(_random(_NUM_ROWS, _HIDDEN, seed=1)[:num_rows].to(backend.device))
    weights = torch.zeros(num_rows, _NUM_EXPERTS).scatter(1, routing.ids.long().cpu(), routing.weights.cpu())
    return torch.cat((weights, x.cpu()), 1)


def _attention(backend: Backend, num_rows: int) -> Tensor:
    """[rows, H]: what attention adds to the last rows of a context that was computed in the cache before."""
    q_size, kv_size = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
    qkv = backend.make_linear(_random(q_size + 2 * kv_size, _HIDDEN) * 0.05, None, "bf16")
    output = backend.make_linear(_random(_HIDDEN, q_size, seed=2) * 0.05, None, "bf16")
    angles = torch.arange(_CONTEXT).float()[:, None] * torch.linspace(1.0, 0.001, _HEAD_DIM // 2)
    cos, sin = (torch.cat((x, x), 1) for x in (angles.cos(), angles.sin()))
    shape = AttentionShape(_HEADS, _KV_HEADS, _HEAD_DIM, "none", 1e-6, None, None, None, cos, sin)
    attention = backend.make_attention(shape, torch.ones(_HIDDEN), qkv, output)
    num_blocks = -(-_CONTEXT // 16)
    sizes = (num_blocks, _KV_HEADS)
    keys = _random(*sizes, _HEAD_DIM, 16, seed=4).bfloat16().to(backend.device)
    values = _random(*sizes, 16, _HEAD_DIM, seed=5).bfloat16().to(backend.device)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(6))
    rows = _random(_NUM_ROWS, _HIDDEN, seed=1)

    def attend(first: int, num: int) -> Tensor:
        """The rows from `first` of the last ones, as a step of so many."""
        start = _CONTEXT - _NUM_ROWS + first
        positions = torch.arange(start, start + num)
        blocks = order[: -(-(start + num) // 16)]
        columns = (
            positions,
            order[positions // 16] * 16 + positions % 16,
            torch.tensor([0, num]),
            torch.tensor([start + num]),
            torch.tensor([0, len(blocks)]),
            blocks,
        )
        residual = rows[first : first + num].to(backend.device)
        before = residual.clone()
        attention(residual, keys, values, Sequences(*(column.int().to(backend.device) for column in columns)))
        return (residual - before).cpu()

    if num_rows < _NUM_ROWS:
        attend(0, _NUM_ROWS - num_rows)
    return attend(_NUM_ROWS - num_rows, num_rows)
