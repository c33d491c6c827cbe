"""The native CPU kernels behind `kernels.backend.Backend`: checks shapes, passes addresses, releases the GIL."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import (
    UNCHOOSABLE,
    AttentionKernel,
    AttentionShape,
    Draw,
    Linear,
    MlpKernel,
    Records,
    RouterKernel,
    Routing,
)
from kernels.cpu import library as lib
from kernels.cpu.layers import NativeAttention, NativeLinear, NativeMlp, NativeRouter
from kernels.cpu.rows import Products, Rows, checked


class NativeBackend:
    """All kernels in one shared library with one thread pool for the process; one engine uses it at a time."""

    name = "native"
    device = torch.device("cpu")

    def __init__(self, num_threads: int, isa: str = "") -> None:
        """`isa` is amx, avx512, avx2 or portable; empty: the best here. Raises `RuntimeError` if it cannot be had."""
        self._library = lib.load_library()
        if self._library.foregate_start(num_threads, isa.encode()) != 0:
            raise RuntimeError(f"this CPU cannot run the native kernels for {isa!r}")
        self.isa: str = self._library.foregate_isa().decode()
        self.num_threads = num_threads
        self._rows = Rows()

    def make_linear(self, weight: Tensor, bias: Tensor | None, format: str) -> Linear:
        return NativeLinear(self._library, weight, bias, format)

    def make_attention(self, shape: AttentionShape, norm: Tensor, qkv: Linear, output: Linear) -> AttentionKernel:
        return NativeAttention(self._library, self._rows, shape, _weights(norm), _native(qkv), _native(output))

    def make_router(self, norm: Tensor, eps: float, router: Linear, num_active: int, routing: str) -> RouterKernel:
        return NativeRouter(self._library, self._rows, _weights(norm), eps, _native(router), num_active, routing)

    def make_mlp(self, norm: Tensor | None, eps: float, gate_up: Linear, down: Linear) -> MlpKernel:
        norm = None if norm is None else _weights(norm)
        return NativeMlp(self._library, norm, eps, _native(gate_up), _native(down))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(checked(x, torch.float32))
        size = x.shape[-1]
        if weight.shape != (size,):
            raise ValueError(f"norm weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
        num_rows = x.numel() // size
        self._library.foregate_rms_norm(x.data_ptr(), weight.data_ptr(), eps, num_rows, size, out.data_ptr())
        return out

    def expert_mlp(
        self,
        x: Tensor,
        routing: Routing,
        records: Records,
        ready: Sequence[tuple[int, int]],
        outputs: Tensor,
        add_to: Tensor | None = None,
    ) -> None:
        products = self._rows.products
        if products is None or not products.fits(x, routing, records.layout, outputs, add_to):
            products = self._rows.products = Products(x, routing, records.layout, outputs, add_to)
        addresses = records.addresses
        experts = array("i", routing.experts)
        ready_experts = array("i", [expert for expert, _ in ready])
        ready_records = array("Q", [addresses[slot] for _, slot in ready])
        call = products.call
        call.routing.num_experts, call.routing.experts = len(experts), experts.buffer_info()[0]
        call.num_ready, call.ready = len(ready_experts), ready_experts.buffer_info()[0]
        call.records = ready_records.buffer_info()[0]
        if self._library.foregate_expert_mlp(products.address) != 0:
            raise ValueError(f"some of the experts {ready} were not routed to")

    def combine(self, outputs: Tensor, weights: Tensor, add_to: Tensor) -> None:
        checked(add_to, torch.float32)
        num_tokens, num_active = weights.shape
        size = add_to.shape[1]
        if outputs.shape != (num_tokens * num_active, size) or add_to.shape[0] != num_tokens:
            raise ValueError(f"outputs {tuple(outputs.shape)} do not fit {tuple(add_to.shape)}")
        self._library.foregate_combine(
            outputs.data_ptr(), weights.data_ptr(), num_tokens, num_active, size, add_to.data_ptr()
        )

    def choose(self, rows: Sequence[Tensor], draws: Sequence[Draw]) -> list[int]:
        """As `kernels.backend.Choose`."""
        num, size = len(rows), len(rows[0])
        addresses = array("Q", [checked(row, torch.float32).data_ptr() for row in rows])
        masks = [None if d.allowed is None else checked(d.allowed, torch.int32) for d in draws]
        if len(draws) != num or any(len(row) != size for row in rows):
            raise ValueError("each draw takes a row, and all rows are of one vocabulary")
        if any(mask is not None and 32 * mask.numel() < size for mask in masks):
            raise ValueError("a mask is shorter than the vocabulary")
        asked = (lib.Draw * num)(
            *[
                lib.Draw(d.uniform, d.temperature, d.top_p, d.min_p, d.top_k, None if mask is None else mask.data_ptr())
                for d, mask in zip(draws, masks, strict=True)
            ]
        )
        tokens = array("i", bytes(4 * num))
        at = addresses.buffer_info()[0], ctypes.addressof(asked), tokens.buffer_info()[0]
        self._library.foregate_choose(ctypes.byref(lib.ChooseCall(num, size, *at)), self.num_threads)
        if min(tokens) < 0:
            raise ValueError(UNCHOOSABLE)
        return tokens.tolist()

    def read(self, memory: Tensor) -> int:
        """Read a uint8 tensor with all threads: the roof for whatever is bound by memory."""
        total: int = self._library.foregate_read(memory.data_ptr(), memory.numel() // 8)
        return total


def _native(linear: Linear) -> NativeLinear:
    if not isinstance(linear, NativeLinear):
        raise TypeError("the matrix was made by another backend")
    return linear


def _weights(x: Tensor) -> Tensor:
    return checked(x, torch.float32)
