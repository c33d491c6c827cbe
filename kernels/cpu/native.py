"""The native CPU kernels behind `kernels.backend.Backend`: checks shapes, passes addresses, releases the GIL."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_int

import torch
from torch import Tensor

from kernels.backend import (
    AttentionKernel,
    AttentionShape,
    Linear,
    MlpKernel,
    Records,
    RouterKernel,
    Routing,
    Sequences,
)
from kernels.cpu import library as lib
from kernels.quant.blocked import pack_matrix
from kernels.quant.layout import RecordLayout

_ROUTINGS = {"softmax": 0, "softmax_renormalised": 1, "unweighted": 2}
_QK_NORMS = {"none": 0, "head": 1, "full": 2}


class NativeLinear:
    """A packed matrix; see `kernels.backend.Linear`."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None, format: str) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self.packed = pack_matrix(format, weight)
        self._bias = None if bias is None else bias.float().contiguous()
        self._run = library.foregate_linear
        self.call = lib.LinearCall(
            format=lib.FORMATS[format],
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
        call = self.call
        call.x, call.x_stride, call.num_rows = x.data_ptr(), self.num_inputs, num_rows
        call.out, call.accumulate = out.data_ptr(), add_to is not None
        self._run(ctypes.addressof(call))
        return out


class _Rows:
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
        self.routing: _RoutingBuffers | None = None
        self.products: _Products | None = None

    def use(self, residual: Tensor) -> None:
        _checked(residual, torch.float32)
        self.residual, self.address = residual, residual.data_ptr()
        self.num_tokens, self.hidden_size = residual.shape

    def use_sequences(self, s: Sequences) -> None:
        tensors = (s.positions, s.slots, s.row_begin, s.context, s.block_begin, s.blocks)
        at = [_checked(tensor, torch.int32).data_ptr() for tensor in tensors]
        self.step = lib.Step(len(s.positions), at[0], at[1], len(s.context), at[2], at[3], at[4], at[5])
        self.sequences, self.step_address = s, ctypes.addressof(self.step)

    def routing_buffers(self, num_experts: int, num_active: int) -> _RoutingBuffers:
        sizes = (self.num_tokens, self.hidden_size, num_experts, num_active)
        if self.routing is None or self.routing.sizes != sizes:
            self.routing = _RoutingBuffers(*sizes)
        return self.routing


class _Products:
    """A call of the expert kernel but for its experts; made again when a tensor is another one."""

    def __init__(
        self, x: Tensor, routing: Routing, layout: RecordLayout, outputs: Tensor, add_to: Tensor | None
    ) -> None:
        self.of = (x, routing.positions, layout, outputs, add_to)
        num_tokens, num_active = routing.ids.shape
        if (
            _checked(x, torch.float32).shape != (num_tokens, layout.hidden_size)
            or _checked(outputs, torch.float32).shape != (num_tokens * num_active, layout.hidden_size)
            or (add_to is not None and _checked(add_to, torch.float32).shape != x.shape)
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


class _RoutingBuffers:
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


class NativeAttention:
    """One layer's attention in one call; see `kernels.backend.AttentionKernel`."""

    def __init__(
        self,
        library: ctypes.CDLL,
        rows: _Rows,
        shape: AttentionShape,
        norm: Tensor,
        qkv: NativeLinear,
        output: NativeLinear,
    ) -> None:
        head_dim = shape.head_dim
        if qkv.num_outputs != (shape.num_heads + 2 * shape.num_kv_heads) * head_dim or norm.shape != (qkv.num_inputs,):
            raise ValueError(f"norm {tuple(norm.shape)} or a qkv of {qkv.num_outputs} rows does not fit {shape}")
        if output.num_inputs != shape.num_heads * head_dim or output.num_outputs != qkv.num_inputs:
            raise ValueError(f"output [{output.num_outputs}, {output.num_inputs}] does not fit {shape}")
        self._run = library.foregate_attention
        self._rows = rows
        self._shape, self._norm, self._qkv, self._output = shape, norm, qkv, output  # keeps alive what is pointed to
        self._layer = lib.AttentionLayer(
            hidden_size=qkv.num_inputs,
            eps=shape.eps,
            norm=norm.data_ptr(),
            qkv=qkv.call,
            output=output.call,
            prepare=lib.QkvCall(
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=head_dim,
                norm=_QK_NORMS[shape.qk_norm],
                eps=shape.eps,
                clip=shape.clip or 0.0,
                q_norm=0 if shape.q_norm is None else shape.q_norm.data_ptr(),
                k_norm=0 if shape.k_norm is None else shape.k_norm.data_ptr(),
                cos=shape.cos.data_ptr(),
                sin=shape.sin.data_ptr(),
            ),
            attention=lib.AttentionCall(
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
            ),
        )
        self._layer_address = ctypes.addressof(self._layer)
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def __call__(self, residual: Tensor, keys: Tensor, values: Tensor, sequences: Sequences) -> None:
        if keys is not self._keys or values is not self._values:
            self._use_cache(keys, values)
        rows = self._rows
        if residual is not rows.residual or sequences is not rows.sequences:
            rows.use(residual)
            rows.use_sequences(sequences)
        assert rows.step is not None
        if rows.num_tokens != rows.step.num_rows or rows.hidden_size != self._qkv.num_inputs:
            raise ValueError(f"residual {tuple(residual.shape)} does not fit the sequences or the layer")
        self._run(self._layer_address, rows.step_address, rows.address)

    def _use_cache(self, keys: Tensor, values: Tensor) -> None:
        shape = self._shape
        tail = (shape.num_kv_heads, shape.head_dim, 16)
        if keys.shape[1:] != tail or values.shape != (len(keys), tail[0], 16, tail[1]) or keys.dtype != values.dtype:
            raise ValueError(f"keys {tuple(keys.shape)} or values {tuple(values.shape)} does not fit {shape}")
        for part in (self._layer.prepare, self._layer.attention):
            part.kv_is_bf16 = int(keys.dtype == torch.bfloat16)
            part.keys, part.values = keys.data_ptr(), values.data_ptr()
        self._keys, self._values = keys, values


class NativeRouter:
    """One layer's norm and router in one call; see `kernels.backend.RouterKernel`."""

    def __init__(
        self,
        library: ctypes.CDLL,
        rows: _Rows,
        norm: Tensor,
        eps: float,
        router: NativeLinear,
        num_active: int,
        routing: str,
    ) -> None:
        if norm.shape != (router.num_inputs,) or not 0 < num_active <= router.num_outputs:
            raise ValueError(
                f"norm {tuple(norm.shape)} or top-{num_active} does not fit a router of {router.num_outputs}"
            )
        self._run = library.foregate_route
        self._rows = rows
        self._norm, self._router, self._num_active = norm, router, num_active
        self._layer = lib.RouterLayer(
            eps=eps, norm=norm.data_ptr(), router=router.call, num_active=num_active, mode=_ROUTINGS[routing]
        )
        self._layer_address = ctypes.addressof(self._layer)

    def __call__(self, residual: Tensor) -> tuple[Tensor, Routing]:
        rows = self._rows
        if residual is not rows.residual:
            rows.use(residual)
        if rows.hidden_size != self._router.num_inputs:
            raise ValueError(
                f"residual {tuple(residual.shape)} does not fit a router of {self._router.num_inputs} inputs"
            )
        to = rows.routing_buffers(self._router.num_outputs, self._num_active)
        num_found = self._run(self._layer_address, rows.address, rows.num_tokens, *to.addresses)
        experts = to.experts[:num_found]
        return to.x, Routing(to.ids, to.weights, experts, to.row_begin, to.positions, to.num_positions)


class NativeMlp:
    """A dense SwiGLU layer in one call; see `kernels.backend.MlpKernel`."""

    def __init__(
        self, library: ctypes.CDLL, norm: Tensor | None, eps: float, gate_up: NativeLinear, down: NativeLinear
    ) -> None:
        if gate_up.num_outputs != 2 * down.num_inputs or gate_up.num_inputs != down.num_outputs:
            raise ValueError(f"gate and up of {gate_up.num_outputs} rows do not fit down of {down.num_inputs} inputs")
        self._run = library.foregate_mlp
        self._norm, self._gate_up, self._down = norm, gate_up, down
        self._layer = lib.MlpLayer(
            eps=eps, norm=0 if norm is None else norm.data_ptr(), gate_up=gate_up.call, down=down.call
        )

    def __call__(self, x: Tensor, residual: Tensor) -> None:
        if _checked(x, torch.float32).shape != _checked(residual, torch.float32).shape:
            raise ValueError(f"x {tuple(x.shape)} does not fit residual {tuple(residual.shape)}")
        if x.shape[1] != self._gate_up.num_inputs:
            raise ValueError(f"x {tuple(x.shape)} does not fit a layer of {self._gate_up.num_inputs} inputs")
        self._run(ctypes.addressof(self._layer), x.data_ptr(), x.shape[0], residual.data_ptr())


class NativeBackend:
    """All kernels in one shared library with one thread pool for the process; one engine uses it at a time."""

    name = "native"

    def __init__(self, num_threads: int, isa: str = "") -> None:
        """`isa` is amx, avx512, avx2 or portable; empty: the best here. Raises `RuntimeError` if it cannot be had."""
        self._library = lib.load_library()
        if self._library.foregate_start(num_threads, isa.encode()) != 0:
            raise RuntimeError(f"this CPU cannot run the native kernels for {isa!r}")
        self.isa: str = self._library.foregate_isa().decode()
        self.num_threads = num_threads
        self._rows = _Rows()

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
        out = torch.empty_like(_checked(x, torch.float32))
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
            products = self._rows.products = _Products(x, routing, records.layout, outputs, add_to)
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
        _checked(add_to, torch.float32)
        num_tokens, num_active = weights.shape
        size = add_to.shape[1]
        if outputs.shape != (num_tokens * num_active, size) or add_to.shape[0] != num_tokens:
            raise ValueError(f"outputs {tuple(outputs.shape)} do not fit {tuple(add_to.shape)}")
        self._library.foregate_combine(
            outputs.data_ptr(), weights.data_ptr(), num_tokens, num_active, size, add_to.data_ptr()
        )

    def read(self, memory: Tensor) -> int:
        """Read a uint8 tensor with all threads: the roof for whatever is bound by memory."""
        total: int = self._library.foregate_read(memory.data_ptr(), memory.numel() // 8)
        return total


def _native(linear: Linear) -> NativeLinear:
    if not isinstance(linear, NativeLinear):
        raise TypeError("the matrix was made by another backend")
    return linear


def _weights(x: Tensor) -> Tensor:
    return _checked(x, torch.float32)


def _checked(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"expected contiguous {dtype}, got {x.dtype} with strides {x.stride()}")
    return x
