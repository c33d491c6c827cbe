"""The decoder that all families share, built from a `ModelSpec`: embed, layers of attention and FFN, logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.layers.attention import Attention
from kernels.backend import Backend, Linear


class FeedForward(Protocol):
    """What follows attention in a layer: x [T, H], normed; adds to residual [T, H]."""

    def __call__(self, x: Tensor, batch: Batch, residual: Tensor) -> None: ...


@dataclass(slots=True)
class DecoderLayer:
    """Pre-norm attention and feed-forward, each added to the residual stream. Norms float32 [H]."""

    attention_norm: Tensor
    attention: Attention
    feed_forward_norm: Tensor
    feed_forward: FeedForward


@dataclass(slots=True)
class Decoder:
    """The whole model; calls are pure but for the KV cache that they write."""

    backend: Backend
    embedding: Tensor  # [V, H]
    layers: list[DecoderLayer]
    norm: Tensor  # float32 [H]
    lm_head: Linear  # [V, H]
    eps: float

    @torch.inference_mode()
    def __call__(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """-> float32 logits [len(batch.logit_rows), V]."""
        norm, eps = self.backend.rms_norm, self.eps
        residual = self.embedding[batch.token_ids].float()
        for i, layer in enumerate(self.layers):
            layer.attention(norm(residual, layer.attention_norm, eps), batch, kv_cache[i], residual)
            layer.feed_forward(norm(residual, layer.feed_forward_norm, eps), batch, residual)
        wanted = residual if batch.logit_rows is None else residual[batch.logit_rows]
        return self.lm_head(norm(wanted, self.norm, eps))
