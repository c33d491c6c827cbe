"""The decoder that all families share, built from a `ModelSpec`: embed, layers of attention and FFN, logits."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import Batch
from engine.kv_cache import KVCache
from engine.layers.foresight import RoutingObserver
from kernels.backend import AttentionKernel, Backend, Linear, MlpKernel, RouterKernel, Routing


class FeedForward(Protocol):
    """What follows attention in a layer, its norm included; adds to residual [T, H]."""

    def __call__(self, residual: Tensor, batch: Batch) -> None: ...


@dataclass(slots=True)
class DenseFeedForward:
    """A layer without experts."""

    mlp: MlpKernel

    def __call__(self, residual: Tensor, batch: Batch) -> None:
        self.mlp(residual, residual)


@dataclass(slots=True)
class DecoderLayer:
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    attention: AttentionKernel
    feed_forward: FeedForward


@dataclass(slots=True)
class Pregate:
    """A small causal model over token ids that routes every layer. Its KV comes after the decoder's layers'."""

    backend: Backend
    input: Linear  # [d, H], takes normed embeddings
    input_norm: Tensor  # float32 [H]
    layers: list[DecoderLayer]
    routers: list[RouterKernel]  # of each of the decoder's layers with experts; take states
    eps: float

    def __call__(self, embedded: Tensor, batch: Batch, kv_cache: KVCache, first_layer: int) -> list[Routing]:
        """Embeddings [T, H] -> routings; keys and values go to the cache's layers from `first_layer` on."""
        state = self.input(self.backend.rms_norm(embedded, self.input_norm, self.eps))
        for i, layer in enumerate(self.layers):
            keys, values = kv_cache[first_layer + i]
            layer.attention(state, keys, values, batch.sequences)
            layer.feed_forward(state, batch)
        return [router(state)[1].copy() for router in self.routers]


@dataclass(slots=True)
class ForwardTimes:
    """Where the seconds of one call went. On a device that computes on its own it is when work was handed over."""

    attention_s: float = 0.0
    feed_forward_s: float = 0.0  # and all else before the logits


@dataclass(slots=True)
class Decoder:
    """The whole model; calls are pure but for the KV cache that they write and `times`, which are the last one's."""

    backend: Backend
    embedding: Tensor  # [V, H]
    layers: list[DecoderLayer]
    norm: Tensor  # float32 [H]
    lm_head: Linear  # [V, H]
    eps: float
    pregate: Pregate | None = None
    observer: RoutingObserver | None = None
    times: ForwardTimes = field(default_factory=ForwardTimes)

    @torch.inference_mode()
    def __call__(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """-> float32 logits [len(batch.logit_rows), V]."""
        residual = self.residual(batch, kv_cache)
        return self.logits(residual if batch.logit_rows is None else residual[batch.logit_rows])

    @torch.inference_mode()
    def logits(self, residual: Tensor) -> Tensor:
        """Rows [n, H] of `residual` -> float32 [n, V]."""
        return self.lm_head(self.backend.rms_norm(residual, self.norm, self.eps))

    @torch.inference_mode()
    def residual(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        """-> float32 [T, H], what the last layer leaves of every token."""
        clock = time.perf_counter
        began = clock()
        residual = self.embedding[batch.token_ids.to(self.embedding.device)].float()
        if self.pregate is not None:
            batch.routings = self.pregate(residual, batch, kv_cache, len(self.layers))
        if self.observer is not None:
            self.observer.step_begins(batch)
        attention_s = 0.0
        for i, layer in enumerate(self.layers):
            keys, values = kv_cache[i]
            attends = clock()
            layer.attention(residual, keys, values, batch.sequences)
            attention_s += clock() - attends
            layer.feed_forward(residual, batch)
        if self.observer is not None:
            self.observer.step_ends()
        self.times = ForwardTimes(attention_s, clock() - began - attention_s)
        return residual
