"""The decoder that all families share, built from a `ModelSpec`: embed, layers of attention and FFN, logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.layers.attention import Attention
from engine.layers.rotary import RotaryEmbedding
from engine.models.spec import ModelSpec
from kernels import reference


class FeedForward(Protocol):
    """What follows attention in a layer."""

    def __call__(self, x: Tensor, batch: Batch) -> Tensor: ...


@dataclass(slots=True)
class DecoderLayer:
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    attention_norm: Tensor
    attention: Attention
    feed_forward_norm: Tensor
    feed_forward: FeedForward


class Decoder:
    """The whole model; calls are pure but for the KV cache that they write."""

    def __init__(
        self,
        spec: ModelSpec,
        embedding: Tensor,
        layers: list[DecoderLayer],
        norm: Tensor,
        lm_head: Tensor,
        rotary: RotaryEmbedding,
    ) -> None:
        self.spec = spec
        self._embedding = embedding  # [V, H]
        self._layers = layers
        self._norm = norm
        self._lm_head = lm_head  # [V, H]
        self._rotary = rotary

    @torch.inference_mode()
    def __call__(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """-> float32 logits [len(batch.logit_rows), V]."""
        eps = self.spec.rms_norm_eps
        x = self._embedding[batch.token_ids]
        rotary = self._rotary(batch.positions, x.dtype)
        for i, layer in enumerate(self._layers):
            x = x + layer.attention(reference.rms_norm(x, layer.attention_norm, eps), batch, kv_cache[i], rotary)
            x = x + layer.feed_forward(reference.rms_norm(x, layer.feed_forward_norm, eps), batch)
        x = reference.rms_norm(x[batch.logit_rows], self._norm, eps)
        return F.linear(x, self._lm_head).float()
