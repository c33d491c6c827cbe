"""Self-attention of one decoder layer over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engine.batch import Batch
from engine.models.spec import ModelSpec
from kernels import reference


@dataclass(slots=True)
class AttentionWeights:
    """qkv [(heads + 2 kv_heads) * D, H] with q, k, v below one another; o [H, heads * D]; norms as qk_norm says."""

    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


class Attention:
    """Projects, norms and rotates as the family wants, then attends."""

    def __init__(self, spec: ModelSpec, weights: AttentionWeights) -> None:
        self._spec = spec
        self._weights = weights

    def __call__(self, x: Tensor, batch: Batch, kv_cache: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, H] -> [T, H]; writes the new tokens' keys and values to the cache."""
        spec, weights = self._spec, self._weights
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        query, key, value = F.linear(x, weights.qkv, weights.qkv_bias).split((q_size, kv_size, kv_size), dim=-1)
        if spec.qk_norm == "full":
            query, key = self._norm(query, weights.q_norm), self._norm(key, weights.k_norm)
        if spec.clip_qkv is not None:
            query, key, value = (part.clamp(-spec.clip_qkv, spec.clip_qkv) for part in (query, key, value))
        query = query.reshape(-1, spec.num_heads, spec.head_dim)
        key = key.reshape(-1, spec.num_kv_heads, spec.head_dim)
        value = value.reshape(-1, spec.num_kv_heads, spec.head_dim)
        if spec.qk_norm == "head":
            query, key = self._norm(query, weights.q_norm), self._norm(key, weights.k_norm)
        query, key = reference.rope(query, *rotary), reference.rope(key, *rotary)
        reference.append_kv(kv_cache, key, value, batch.new_slots)
        attended = reference.paged_attention(query, kv_cache, batch.spans, batch.context_slots, spec.head_dim**-0.5)
        return F.linear(attended.flatten(1), weights.o, weights.o_bias)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return reference.rms_norm(x, weight, self._spec.rms_norm_eps)
