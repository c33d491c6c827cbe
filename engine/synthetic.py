"""A checkpoint of random weights that lies nowhere: shapes of known models for measuring without downloading them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.convert import Progress
from engine.engine import Engine
from engine.errors import ConfigError
from engine.models import FAMILIES
from engine.number_tokenizer import NumberTokenizer

_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
SHAPES = {
    "olmoe": _COMMON
    | {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
    },
    "qwen3-30b-a3b": _COMMON
    | {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "mixtral": _COMMON
    | {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
}
_POOL_SIZE = 1 << 22


class SyntheticCheckpoint(Checkpoint):
    """Weights are windows of one pool of normal numbers, scaled so that activations stay of order one."""

    def __init__(self, shape: str, num_layers: int | None, directory: Path, routing_skew: float = 0.0) -> None:
        """`directory` is where packed experts go. Raises `ConfigError` for an unknown shape.

        `routing_skew`: spread of a bias that each expert has in its router, beside logits of spread one: 0 uses all
        experts alike, which no trained model does.
        """
        if shape not in SHAPES:
            raise ConfigError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
        self.directory = directory
        self.config = dict(SHAPES[shape])
        if num_layers is not None:
            self.config["num_hidden_layers"] = num_layers
        self.model_type = str(self.config["model_type"])
        self.spec = FAMILIES[self.model_type](self.config)
        self._routing_skew = routing_skew
        if routing_skew and self.spec.moe is not None:
            self.spec = replace(self.spec, moe=replace(self.spec.moe, router_bias=True))
        self._pool = torch.randn(_POOL_SIZE, generator=torch.Generator().manual_seed(0))

    def __contains__(self, name: str) -> bool:
        return True

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        size = torch.Size(shape).numel()
        start = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % (_POOL_SIZE // 2)
        window = self._pool[start : start + _POOL_SIZE // 2]
        values: Tensor = window.repeat(-(-size // len(window)))[:size].view(shape)
        if name.endswith(".bias"):
            return values.mul(self._routing_skew)
        if name.endswith("embed_tokens.weight"):  # as large as what layers add, so that a token's routing is its own
            return values.clone()
        return values.mul(shape[-1] ** -0.5)

    def close(self) -> None:
        pass

    @cached_property
    def fingerprint(self) -> str:
        return "synthetic-" + hashlib.blake2b(json.dumps(self.config).encode(), digest_size=8).hexdigest()

    def eos_token_ids(self) -> tuple[int, ...]:
        return ()


def random_engine(shape: str, num_layers: int | None, config: EngineConfig, progress: Progress | None = None) -> Engine:
    """An engine of random weights; `config.model` names it and is where its packed experts go by default."""
    checkpoint = SyntheticCheckpoint(shape, num_layers, config.model)
    return Engine(config, progress, checkpoint=checkpoint, tokenizer=NumberTokenizer())
