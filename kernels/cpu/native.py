"""The native CPU kernels behind `kernels.backend.Backend`: checks shapes, passes addresses, releases the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_char_p, c_float, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.backend import AttentionShape, Linear, Routing, Sequences
from kernels.quant.blocked import pack_matrix
from kernels.quant.layout import RecordLayout

_FORMATS = {"float32": 0, "bf16": 1, "int8": 2, "int4": 3}
_ROUTINGS = {"softmax": 0, "softmax_renormalised": 1, "unweighted": 2}
_QK_NORMS = {"none": 0, "head": 1, "full": 2}
_LIBRARY = Path(__file__).parent / "libforegate.so"


class _ExpertCall(ctypes.Structure):
    _fields_ = (
        ("format", c_int),
        ("hidden_size", c_int),
        ("intermediate_size", c_int),
        ("x", c_void_p),
        ("num_tokens", c_int),
        ("num_active", c_int),
        ("num_experts", c_int),
        ("records", c_void_p),
        ("row_begin", c_void_p),
        ("row_end", c_void_p),
        ("positions", c_void_p),
        ("out", c_void_p),
    )


class _LinearCall(ctypes.Structure):
    _fields_ = (
        ("format", c_int),
        ("num_outputs", c_int),
        ("num_inputs", c_int),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("num_rows", c_int),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("accumulate", c_int),
    )


class _AttentionCall(ctypes.Structure):
    _fields_ = (
        ("num_heads", c_int),
        ("num_kv_heads", c_int),
        ("head_dim", c_int),
        ("kv_is_bf16", c_int),
        ("scale", c_float),
        ("query", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("num_seqs", c_int),
        ("row_begin", c_void_p),
        ("context", c_void_p),
        ("block_begin", c_void_p),
        ("blocks", c_void_p),
        ("out", c_void_p),
    )


class _QkvCall(ctypes.Structure):
    _fields_ = (
        ("num_heads", c_int),
        ("num_kv_heads", c_int),
        ("head_dim", c_int),
        ("kv_is_bf16", c_int),
        ("norm", c_int),
        ("eps", c_float),
        ("clip", c_float),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("qkv", c_void_p),
        ("num_rows", c_int),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


@cache
def _load() -> ctypes.CDLL:
    if not _LIBRARY.exists():
        raise RuntimeError("the native kernels were not built: install a C++17 compiler and install Foregate again")
    library = ctypes.CDLL(str(_LIBRARY))
    library.foregate_start.argtypes = (c_int, c_char_p)
    library.foregate_isa.restype = c_char_p
    for name in ("expert_mlp", "linear", "prepare_qkv", "attention"):
        function = getattr(library, f"foregate_{name}")
        function.argtypes, function.restype = (c_void_p,), None
    library.foregate_rms_norm.argtypes = (c_void_p, c_void_p, c_float, c_int, c_int, c_void_p)
    library.foregate_rms_norm.restype = None
    library.foregate_combine.argtypes = (c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_int)
    library.foregate_combine.restype = None
    library.foregate_swiglu.argtypes = (c_void_p, c_int, c_int, c_void_p)
    library.foregate_swiglu.restype = None
    library.foregate_route.argtypes = (c_void_p, c_int, c_int, c_int, c_int, *[c_void_p] * 5)
    library.foregate_read.argtypes = (c_void_p, c_int64)
    library.foregate_read.restype = c_uint64
    return library


class NativeLinear:
    """A packed matrix; see `kernels.backend.Linear`."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None, format: str) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self.packed = pack_matrix(format, weight)
        self._bias = None if bias is None else _checked(bias.float().contiguous(), torch.float32)
        self._run = library.foregate_linear
        self._call = _LinearCall(
            format=_FORMATS[format],
            num_outputs=self.num_outputs,
            num_inputs=self.num_inputs,
            weight=self.packed.data_ptr(),
            bias=0 if self._bias is None else self._bias.data_ptr(),
            out_stride=self.num_outputs,
        )

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        _checked(x, torch.float32)
        num_rows = x.shape[0]
        out = torch.empty(num_rows, self.num_outputs) if add_to is None else _checked(add_to, torch.float32)
        if x.shape[1] != self.num_inputs or out.shape != (num_rows, self.num_outputs):
            raise ValueError(
                f"x {tuple(x.shape)} or out {tuple(out.shape)} does not fit a matrix of "
                f"[{self.num_outputs}, {self.num_inputs}]"
            )
        call = self._call
        call.x, call.x_stride, call.num_rows = x.data_ptr(), self.num_inputs, num_rows
        call.out, call.accumulate = out.data_ptr(), add_to is not None
        self._run(ctypes.addressof(call))
        return out


class NativeBackend:
    """All kernels in one shared library with one thread pool for the process; one engine uses it at a time."""

    name = "native"

    def __init__(self, num_threads: int, isa: str = "") -> None:
        """`isa` is avx512, avx2 or portable; empty: the best here. Raises `RuntimeError` if it cannot be had."""
        self._library = _load()
        if self._library.foregate_start(num_threads, isa.encode()) != 0:
            raise RuntimeError(f"this CPU cannot run the native kernels for {isa!r}")
        self.isa: str = self._library.foregate_isa().decode()
        self.num_threads = num_threads

    def make_linear(self, weight: Tensor, bias: Tensor | None, format: str) -> Linear:
        return NativeLinear(self._library, weight, bias, format)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(_checked(x, torch.float32))
        size = x.shape[-1]
        if weight.shape != (size,):
            raise ValueError(f"norm weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
        num_rows = x.numel() // size
        self._library.foregate_rms_norm(x.data_ptr(), weight.data_ptr(), eps, num_rows, size, out.data_ptr())
        return out

    def attend(self, shape: AttentionShape, qkv: Tensor, keys: Tensor, values: Tensor, sequences: Sequences) -> Tensor:
        _checked(qkv, torch.float32)
        num_rows, head_dim = qkv.shape[0], shape.head_dim
        width = (shape.num_heads + 2 * shape.num_kv_heads) * head_dim
        if qkv.shape[1] != width or keys.shape[1:] != (shape.num_kv_heads, head_dim, 16) or keys.dtype != values.dtype:
            raise ValueError(f"qkv {tuple(qkv.shape)} or keys {tuple(keys.shape)} does not fit {shape}")
        is_bf16 = int(keys.dtype == torch.bfloat16)
        query = torch.empty(num_rows, shape.num_heads * head_dim)
        out = torch.empty_like(query)
        prepare = _QkvCall(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=head_dim,
            kv_is_bf16=is_bf16,
            norm=_QK_NORMS[shape.qk_norm],
            eps=shape.eps,
            clip=shape.clip or 0.0,
            q_norm=0 if shape.q_norm is None else shape.q_norm.data_ptr(),
            k_norm=0 if shape.k_norm is None else shape.k_norm.data_ptr(),
            cos=shape.cos.data_ptr(),
            sin=shape.sin.data_ptr(),
            qkv=qkv.data_ptr(),
            num_rows=num_rows,
            positions=sequences.positions.data_ptr(),
            slots=sequences.slots.data_ptr(),
            query=query.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
        )
        self._library.foregate_prepare_qkv(ctypes.addressof(prepare))
        call = _AttentionCall(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=head_dim,
            kv_is_bf16=is_bf16,
            scale=head_dim**-0.5,
            query=query.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            num_seqs=len(sequences.context),
            row_begin=sequences.row_begin.data_ptr(),
            context=sequences.context.data_ptr(),
            block_begin=sequences.block_begin.data_ptr(),
            blocks=sequences.blocks.data_ptr(),
            out=out.data_ptr(),
        )
        self._library.foregate_attention(ctypes.addressof(call))
        return out

    def route(self, logits: Tensor, num_active: int, routing: str) -> Routing:
        _checked(logits, torch.float32)
        num_tokens, num_experts = logits.shape
        num_positions = num_tokens * num_active
        ids, weights = torch.empty(num_tokens, num_active, dtype=torch.int32), torch.empty(num_tokens, num_active)
        found = torch.empty(2 * num_experts + 1, dtype=torch.int32)
        positions = torch.empty(num_positions, dtype=torch.int32)
        experts, row_begin = found[:num_experts], found[num_experts:]
        num_found = self._library.foregate_route(
            logits.data_ptr(),
            num_tokens,
            num_experts,
            num_active,
            _ROUTINGS[routing],
            ids.data_ptr(),
            weights.data_ptr(),
            experts.data_ptr(),
            row_begin.data_ptr(),
            positions.data_ptr(),
        )
        return Routing(ids, weights, experts[:num_found].tolist(), row_begin[: num_found + 1], positions)

    def expert_mlp(
        self, x: Tensor, routing: Routing, experts: Sequence[tuple[int, Tensor]], layout: RecordLayout, out: Tensor
    ) -> None:
        _checked(x, torch.float32)
        _checked(out, torch.float32)
        num_tokens, num_active = routing.ids.shape
        if x.shape != (num_tokens, layout.hidden_size) or out.shape != (num_tokens * num_active, layout.hidden_size):
            raise ValueError(f"x {tuple(x.shape)} or out {tuple(out.shape)} does not fit the routing")
        if any(record.numel() < layout.nbytes for _, record in experts):
            raise ValueError("a record is shorter than its layout")
        begin = routing.row_begin.tolist()
        index = {expert: i for i, expert in enumerate(routing.experts)}
        at = [index[expert] for expert, _ in experts]
        num_experts = len(at)
        records = (c_void_p * num_experts)(*[record.data_ptr() for _, record in experts])
        row_begin = (c_int * num_experts)(*[begin[i] for i in at])
        row_end = (c_int * num_experts)(*[begin[i + 1] for i in at])
        call = _ExpertCall(
            format=_FORMATS[layout.format],
            hidden_size=layout.hidden_size,
            intermediate_size=layout.intermediate_size,
            x=x.data_ptr(),
            num_tokens=num_tokens,
            num_active=num_active,
            num_experts=num_experts,
            records=ctypes.addressof(records),
            row_begin=ctypes.addressof(row_begin),
            row_end=ctypes.addressof(row_end),
            positions=routing.positions.data_ptr(),
            out=out.data_ptr(),
        )
        self._library.foregate_expert_mlp(ctypes.addressof(call))

    def combine(self, outputs: Tensor, weights: Tensor, add_to: Tensor) -> None:
        _checked(add_to, torch.float32)
        num_tokens, num_active = weights.shape
        size = add_to.shape[1]
        if outputs.shape != (num_tokens * num_active, size) or add_to.shape[0] != num_tokens:
            raise ValueError(f"outputs {tuple(outputs.shape)} do not fit {tuple(add_to.shape)}")
        self._library.foregate_combine(
            outputs.data_ptr(), weights.data_ptr(), num_tokens, num_active, size, add_to.data_ptr(), 1
        )

    def swiglu(self, gate_up: Tensor) -> Tensor:
        num_rows, width = _checked(gate_up, torch.float32).shape
        out = torch.empty(num_rows, width // 2)
        self._library.foregate_swiglu(gate_up.data_ptr(), num_rows, width // 2, out.data_ptr())
        return out

    def read(self, memory: Tensor) -> int:
        """Read a uint8 tensor with all threads: the roof for whatever is bound by memory."""
        total: int = self._library.foregate_read(memory.data_ptr(), memory.numel() // 8)
        return total


def _checked(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"expected contiguous {dtype}, got {x.dtype} with strides {x.stride()}")
    return x
