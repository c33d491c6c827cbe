"""The backend that computes by `kernels.reference`: slow, needs no compiler, and is what native kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels import reference
from kernels.backend import AttentionShape, Linear, Routing, Sequences
from kernels.quant.blocked import pack_matrix, unpack_matrix
from kernels.quant.formats import FORMATS
from kernels.quant.layout import RecordLayout


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

    def make_linear(self, weight: Tensor, bias: Tensor | None, format: str) -> Linear:
        return _Linear(weight, bias, format)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return reference.rms_norm(x, weight, eps)

    def attend(self, shape: AttentionShape, qkv: Tensor, keys: Tensor, values: Tensor, sequences: Sequences) -> Tensor:
        query, key, value = _heads(shape, qkv)
        at = sequences.positions.long()
        cos, sin = shape.cos[at], shape.sin[at]
        reference.append_kv(keys, values, reference.rope(key, cos, sin), value, sequences.slots)
        blocks = sequences.blocks.split(sequences.block_begin.diff().tolist())
        out = reference.paged_attention(
            reference.rope(query, cos, sin),
            keys,
            values,
            sequences.row_begin.tolist(),
            sequences.context.tolist(),
            list(blocks),
            shape.head_dim**-0.5,
        )
        return out.flatten(1)

    def route(self, logits: Tensor, num_active: int, routing: str) -> Routing:
        ids, weights = reference.route(logits, num_active, routing)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
        row_begin = F.pad(counts.cumsum(0), (1, 0)).int()
        return Routing(ids, weights, experts.tolist(), row_begin, order.int())

    def expert_mlp(
        self, x: Tensor, routing: Routing, experts: Sequence[tuple[int, Tensor]], layout: RecordLayout, out: Tensor
    ) -> None:
        index = {expert: i for i, expert in enumerate(routing.experts)}
        begin = routing.row_begin.tolist()
        for expert, record in experts:
            at = routing.positions[begin[index[expert]] : begin[index[expert] + 1]].long()
            weights = FORMATS[layout.format].unpack(record, layout)
            out[at] = reference.swiglu(x[at // routing.ids.shape[1]], *weights, layout.format)

    def combine(self, outputs: Tensor, weights: Tensor, add_to: Tensor) -> None:
        add_to += reference.combine(outputs.view(*weights.shape, -1), weights)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


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
