"""Whole parts of a layer, each in one native call: a matrix, attention, a router, a dense SwiGLU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels.backend import AttentionShape, Routing, Sequences
from kernels.cpu import library as lib
from kernels.cpu.rows import Rows, checked
from kernels.quant.blocked import pack_matrix

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
        checked(x, torch.float32)
        num_rows = x.shape[0]
        out = torch.empty(num_rows, self.num_outputs) if add_to is None else checked(add_to, torch.float32)
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


class NativeAttention:
    """One layer's attention in one call; see `kernels.backend.AttentionKernel`."""

    def __init__(
        self,
        library: ctypes.CDLL,
        rows: Rows,
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
        rows: Rows,
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
        if checked(x, torch.float32).shape != checked(residual, torch.float32).shape:
            raise ValueError(f"x {tuple(x.shape)} does not fit residual {tuple(residual.shape)}")
        if x.shape[1] != self._gate_up.num_inputs:
            raise ValueError(f"x {tuple(x.shape)} does not fit a layer of {self._gate_up.num_inputs} inputs")
        self._run(ctypes.addressof(self._layer), x.data_ptr(), x.shape[0], residual.data_ptr())
