"""The pre-gate in plain torch, to be learned and measured: token ids -> every layer's router logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from engine.models.spec import PregateSpec
from engine.refactor.dense import Rotary
from engine.refactor.llama_config import LlamaConfig
from kernels.reference import rms_norm, rope


class PregateModel(nn.Module):
    """Llama's blocks over a projection of the model's own embeddings, then a router per layer; float32.

    Parameters have the names that a checkpoint has under `model.pregate.`. Attention has the model's KV heads.
    """

    def __init__(self, config: LlamaConfig, spec: PregateSpec, num_experts: int, split_layers: Sequence[int]) -> None:
        super().__init__()
        self.config, self.spec, self.num_experts = config, spec, num_experts
        inner = config.num_key_value_heads * config.head_dim
        size = spec.hidden_size
        self.input = nn.Linear(config.hidden_size, size, bias=False)
        self.layers = nn.ModuleList(_Block(size, inner, spec.intermediate_size) for _ in range(spec.num_layers))
        self.norm = _Norm(size)
        self.routers = nn.ModuleDict({str(layer): nn.Linear(size, num_experts) for layer in split_layers})

    def forward(self, embedded: Tensor, rotary: Rotary) -> Tensor:
        """Embeddings [B, T, H] -> router logits [B, T, L, E] of the layers that are split."""
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        num_seqs, length, hidden_size = embedded.shape
        cos, sin = rotary.cos[:length].repeat(num_seqs, 1), rotary.sin[:length].repeat(num_seqs, 1)
        state = self.input(rms_norm(embedded, torch.ones(hidden_size), eps))
        for block in self.layers:
            assert isinstance(block, _Block)
            x = rms_norm(state, block.input_layernorm.weight, eps).flatten(0, 1)
            attention = block.self_attn
            q, k = (
                rope(p(x).unflatten(-1, (-1, head_dim)), cos, sin) for p in (attention["q_proj"], attention["k_proj"])
            )
            v = attention["v_proj"](x).unflatten(-1, (-1, head_dim))
            q, k, v = (t.unflatten(0, (num_seqs, length)).transpose(1, 2) for t in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            state = state + attention["o_proj"](attended.transpose(1, 2).flatten(2))
            x = rms_norm(state, block.post_attention_layernorm.weight, eps)
            mlp = block.mlp
            state = state + mlp["down_proj"](F.silu(mlp["gate_proj"](x)) * mlp["up_proj"](x))
        state = rms_norm(state, self.norm.weight, eps)
        weight = torch.cat([router.weight for router in self.routers.values()])  # type: ignore[misc]
        bias = torch.cat([router.bias for router in self.routers.values()])  # type: ignore[misc]
        logits: Tensor = F.linear(state, weight, bias).unflatten(-1, (-1, self.num_experts))
        return logits


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class _Block(nn.Module):
    def __init__(self, size: int, attention_size: int, inner_size: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = _Norm(size), _Norm(size)
        self.self_attn = nn.ModuleDict({f"{p}_proj": nn.Linear(size, attention_size, bias=False) for p in "qkv"})
        self.self_attn["o_proj"] = nn.Linear(attention_size, size, bias=False)
        self.mlp = nn.ModuleDict({f"{p}_proj": nn.Linear(size, inner_size, bias=False) for p in ("gate", "up")})
        self.mlp["down_proj"] = nn.Linear(inner_size, size, bias=False)
