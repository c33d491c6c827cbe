"""The backend that computes by `kernels.reference`: slow, needs no compiler, and is what native kernels are held to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels import reference
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
    Sequences,
)
from kernels.quant.blocked import pack_matrix, unpack_matrix
from kernels.quant.formats import FORMATS


class _Linear:
    def __init__(self, weight: Tensor, bias: Tensor | None, format: str) -> None:
        self._weight = unpack_matrix(format, pack_matrix(format, weight), *weight.shape).contiguous()
        self._bias = bias
        self._format = format

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        out = reference.linear(x, self._weight, self._bias, self._format)
        return out if add_to is None else add_to.add_(out)


class TorchBackend:
    """See `kernels.backend.Backend`."""

    name = "reference"
    device = torch.device("cpu")

    def make_linear(self, weight: Tensor, bias: Tensor | None, format: str) -> Linear:
        return _Linear(weight, bias, format)

    def make_attention(self, shape: AttentionShape, norm: Tensor, qkv: Linear, output: Linear) -> AttentionKernel:
        def attention(residual: Tensor, keys: Tensor, values: Tensor, sequences: Sequences) -> None:
            x = reference.rms_norm(residual, norm, shape.eps)
            query, key, value = _heads(shape, qkv(x))
            at = sequences.positions.long()
            cos, sin = shape.cos[at], shape.sin[at]
            reference.append_kv(keys, values, reference.rope(key, cos, sin), value, sequences.slots)
            attended = reference.paged_attention(
                reference.rope(query, cos, sin),
                keys,
                values,
                sequences.row_begin.tolist(),
                sequences.context.tolist(),
                list(sequences.blocks.split(sequences.block_begin.diff().tolist())),
                shape.head_dim**-0.5,
            )
            output(attended.flatten(1), add_to=residual)

        return attention

    def make_router(self, norm: Tensor, eps: float, router: Linear, num_active: int, routing: str) -> RouterKernel:
        def route(residual: Tensor) -> tuple[Tensor, Routing]:
            x = reference.rms_norm(residual, norm, eps)
            return x, Routing.of(*reference.route(router(x), num_active, routing))

        return route

    def make_mlp(self, norm: Tensor | None, eps: float, gate_up: Linear, down: Linear) -> MlpKernel:
        def mlp(x: Tensor, residual: Tensor) -> None:
            gate, up = gate_up(x if norm is None else reference.rms_norm(x, norm, eps)).chunk(2, dim=-1)
            down(F.silu(gate) * up, add_to=residual)

        return mlp

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return reference.rms_norm(x, weight, eps)

    def expert_mlp(
        self,
        x: Tensor,
        routing: Routing,
        records: Records,
        ready: Sequence[tuple[int, int]],
        outputs: Tensor,
        add_to: Tensor | None = None,
    ) -> None:
        layout = records.layout
        index = {expert: i for i, expert in enumerate(routing.experts)}
        begin = routing.row_begin.tolist()
        for expert, slot in ready:
            at = routing.positions[begin[index[expert]] : begin[index[expert] + 1]].long()
            weights = FORMATS[layout.format].unpack(records.slots[slot], layout)
            outputs[at] = reference.swiglu(x[at // routing.ids.shape[1]], *weights, layout.format)
        if add_to is not None:
            self.combine(outputs, routing.weights, add_to)

    def combine(self, outputs: Tensor, weights: Tensor, add_to: Tensor) -> None:
        add_to += reference.combine(outputs.view(*weights.shape, -1), weights)


def choose(rows: Sequence[Tensor], draws: Sequence[Draw]) -> list[int]:
    """As `kernels.backend.Choose`."""
    return [_choose(row, draw) for row, draw in zip(rows, draws, strict=True)]


def _choose(logits: Tensor, draw: Draw) -> int:
    if draw.allowed is not None:
        bits = draw.allowed.unsqueeze(1) >> torch.arange(32) & 1
        logits = logits.masked_fill(bits.flatten()[: len(logits)] == 0, float("-inf"))
    top = float(logits.max())
    if not math.isfinite(top):
        raise ValueError(UNCHOOSABLE)
    return reference.choose(logits, draw.uniform, draw.temperature, draw.top_k, draw.top_p, draw.min_p)


def _heads(shape: AttentionShape, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split, norm and clip -> query [T, heads, D], key and value [T, kv_heads, D]."""
    kv_size = shape.num_kv_heads * shape.head_dim
    query, key, value = qkv.split((shape.num_heads * shape.head_dim, kv_size, kv_size), dim=-1)

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return reference.rms_norm(x, weight, shape.eps)

    if shape.qk_norm == "full":
        query, key = norm(query, shape.q_norm), norm(key, shape.k_norm)
    if shape.clip is not None:
        query, key, value = (part.clamp(-shape.clip, shape.clip) for part in (query, key, value))
    query, key, value = (part.unflatten(-1, (-1, shape.head_dim)) for part in (query, key, value))
    if shape.qk_norm == "head":
        query, key = norm(query, shape.q_norm), norm(key, shape.k_norm)
    return query, key, value
