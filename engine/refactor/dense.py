"""The dense model, one decoder layer at a time in plain torch, so that any size streams in the memory of one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engine.refactor.llama_config import LlamaConfig
from engine.refactor.source import DenseSource
from kernels.reference import rms_norm, rope

_TENSOR_OF = {
    "input_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "post_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """Float32 weights of one layer: q [heads*D, H], k and v [kv_heads*D, H], o [H, heads*D], gate and up [I, H]."""

    input_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor  # [H, I]

    @classmethod
    def load(cls, source: DenseSource, layer: int) -> DenseLayer:
        """Raises `CheckpointError` when a tensor is missing."""
        prefix = f"model.layers.{layer}."
        return cls(**{f.name: source.tensor(f"{prefix}{_TENSOR_OF[f.name]}.weight") for f in fields(cls)})

    def neurons(self, x: Tensor) -> Tensor:
        """Normed input [..., H] -> activation of each FFN neuron [..., I]."""
        return F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and sin [positions, D] of every position."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, config: LlamaConfig, num_positions: int) -> Rotary:
        inverse = torch.tensor(config.inverse_frequencies(), dtype=torch.float64)
        angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * inverse
        angles = torch.cat((angles, angles), dim=-1)
        return cls(angles.cos().float(), angles.sin().float())


def embed(source: DenseSource, tokens: Tensor) -> Tensor:
    """Token ids [B, T] -> hidden states [B, T, H]."""
    return F.embedding(tokens, source.tensor("model.embed_tokens.weight"))


def attend(hidden: Tensor, layer: DenseLayer, config: LlamaConfig, rotary: Rotary) -> Tensor:
    """Hidden [B, T, H] -> hidden plus its causal self-attention over the whole sequence [B, T, H]."""
    num_seqs, length, _ = hidden.shape
    x = rms_norm(hidden, layer.input_norm, config.rms_norm_eps).flatten(0, 1)  # [B * T, H]
    cos, sin = rotary.cos[:length].repeat(num_seqs, 1), rotary.sin[:length].repeat(num_seqs, 1)
    q = rope(F.linear(x, layer.q).unflatten(-1, (-1, config.head_dim)), cos, sin)
    k = rope(F.linear(x, layer.k).unflatten(-1, (-1, config.head_dim)), cos, sin)
    v = F.linear(x, layer.v).unflatten(-1, (-1, config.head_dim))
    q, k, v = (t.unflatten(0, (num_seqs, length)).transpose(1, 2) for t in (q, k, v))  # [B, heads, T, D]
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return hidden + F.linear(attended.transpose(1, 2).flatten(2), layer.o)


def token_log_likelihoods(source: DenseSource, hidden: Tensor, tokens: Tensor, rows: int = 512) -> Iterator[Tensor]:
    """Last layer's hidden [B, T, H], tokens [B, T] -> per sequence, ln p of tokens 1..T-1 given those before [T-1]."""
    config = source.config
    norm = source.tensor("model.norm.weight")
    head = source.tensor("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
    for states, ids in zip(hidden, tokens, strict=True):
        states = rms_norm(states[:-1], norm, config.rms_norm_eps)
        parts = [
            -F.cross_entropy(F.linear(x, head), y, reduction="none")
            for x, y in zip(states.split(rows), ids[1:].split(rows), strict=True)
        ]
        yield torch.cat(parts)
