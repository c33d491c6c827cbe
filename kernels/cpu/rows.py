"""What the layers of a step share on their way into the native kernels: addresses of tensors that were checked once."""

from __future__ import annotations

import ctypes
from ctypes import c_int

import torch
from torch import Tensor

from kernels.backend import Routing, Sequences
from kernels.cpu import library as lib
from kernels.quant.layout import RecordLayout


class Rows:
    """What all layers of a step share: checked once, since a tensor's shape and address do not change.

    Between two layers the experts' bytes have driven Python out of the CPU's caches, so each tensor operation that is
    not made there counts.
    """

    def __init__(self) -> None:
        self.residual: Tensor | None = None
        self.address = self.num_tokens = self.hidden_size = 0
        self.sequences: Sequences | None = None
        self.step: lib.Step | None = None
        self.step_address = 0
        self.routing: RoutingBuffers | None = None
        self.products: Products | None = None

    def use(self, residual: Tensor) -> None:
        checked(residual, torch.float32)
        self.residual, self.address = residual, residual.data_ptr()
        self.num_tokens, self.hidden_size = residual.shape

    def use_sequences(self, s: Sequences) -> None:
        tensors = (s.positions, s.slots, s.row_begin, s.context, s.block_begin, s.blocks)
        at = [checked(tensor, torch.int32).data_ptr() for tensor in tensors]
        self.step = lib.Step(len(s.positions), at[0], at[1], len(s.context), at[2], at[3], at[4], at[5])
        self.sequences, self.step_address = s, ctypes.addressof(self.step)

    def routing_buffers(self, num_experts: int, num_active: int) -> RoutingBuffers:
        sizes = (self.num_tokens, self.hidden_size, num_experts, num_active)
        if self.routing is None or self.routing.sizes != sizes:
            self.routing = RoutingBuffers(*sizes)
        return self.routing


class Products:
    """A call of the expert kernel but for its experts; made again when a tensor is another one."""

    def __init__(
        self, x: Tensor, routing: Routing, layout: RecordLayout, outputs: Tensor, add_to: Tensor | None
    ) -> None:
        self.of = (x, routing.positions, layout, outputs, add_to)
        num_tokens, num_active = routing.ids.shape
        if (
            checked(x, torch.float32).shape != (num_tokens, layout.hidden_size)
            or checked(outputs, torch.float32).shape != (num_tokens * num_active, layout.hidden_size)
            or (add_to is not None and checked(add_to, torch.float32).shape != x.shape)
        ):
            raise ValueError(f"x {tuple(x.shape)} or outputs {tuple(outputs.shape)} does not fit the routing")
        self.call = lib.ExpertCall(
            format=lib.FORMATS[layout.format],
            hidden_size=layout.hidden_size,
            intermediate_size=layout.intermediate_size,
            x=x.data_ptr(),
            num_tokens=num_tokens,
            num_active=num_active,
            routing=lib.Routing(row_begin=routing.row_begin.data_ptr(), positions=routing.positions.data_ptr()),
            out=outputs.data_ptr(),
            residual=0 if add_to is None else add_to.data_ptr(),
            weights=routing.weights.data_ptr(),
        )
        self._tensors = (routing.weights, routing.row_begin)  # what is pointed to
        self.address = ctypes.addressof(self.call)

    def fits(self, x: Tensor, routing: Routing, layout: RecordLayout, outputs: Tensor, add_to: Tensor | None) -> bool:
        of = self.of
        return (
            x is of[0]
            and routing.positions is of[1]
            and layout is of[2]
            and outputs is of[3]
            and add_to is of[4]
            and routing.weights is self._tensors[0]
            and routing.row_begin is self._tensors[1]
        )


class RoutingBuffers:
    """What a router writes; the next layer's router writes it again."""

    def __init__(self, num_tokens: int, hidden_size: int, num_experts: int, num_active: int) -> None:
        self.sizes = (num_tokens, hidden_size, num_experts, num_active)
        self.num_positions = num_tokens * num_active
        self.x = torch.empty(num_tokens, hidden_size)
        self.ids = torch.empty(num_tokens, num_active, dtype=torch.int32)
        self.weights = torch.empty(num_tokens, num_active)
        self.experts = (c_int * num_experts)()
        self.row_begin = torch.empty(num_experts + 1, dtype=torch.int32)
        self.positions = torch.empty(num_tokens * num_active, dtype=torch.int32)
        self.addresses = (
            self.x.data_ptr(),
            self.ids.data_ptr(),
            self.weights.data_ptr(),
            ctypes.addressof(self.experts),
            self.row_begin.data_ptr(),
            self.positions.data_ptr(),
        )


def checked(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`; raises `ValueError` where a kernel could not read it."""
    if x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"expected contiguous {dtype}, got {x.dtype} with strides {x.stride()}")
    return x
