"""The shape of a dense Llama, checked once when a checkpoint is opened. Knows no files and no tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "llama3")

_LINEAR_KEYS = ("factor",)
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """config.json of a dense Llama, in Hugging Face's spelling, with every default filled in."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    hidden_act: str = "silu"

    @property
    def eos_token_ids(self) -> frozenset[int]:
        if self.eos_token_id is None:
            return frozenset()
        return frozenset([self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id)

    def as_dict(self) -> dict[str, Any]:
        """As config.json spells it today: `rope_parameters` holds base and scaling."""
        fields = asdict(self)
        scaling = fields.pop("rope_scaling") or {"rope_type": "default"}
        return fields | {"rope_parameters": scaling | {"rope_theta": fields.pop("rope_theta")}}

    def inverse_frequencies(self) -> list[float]:
        """Rotations in radians per position [head_dim / 2], scaled as `rope_scaling` says (Llama 3.1's formula)."""
        dim = self.head_dim
        inverse = [self.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
        if self.rope_scaling is None:
            return inverse
        factor = float(self.rope_scaling["factor"])
        if self.rope_scaling["rope_type"] == "linear":
            return [f / factor for f in inverse]
        low, high = float(self.rope_scaling["low_freq_factor"]), float(self.rope_scaling["high_freq_factor"])
        context = float(self.rope_scaling["original_max_position_embeddings"])
        scaled = []
        for f in inverse:
            turns = context * f / (2 * math.pi)  # full turns within the original context
            share = min(1.0, max(0.0, (turns - low) / (high - low)))  # 1: kept, 0: slowed by the factor
            scaled.append(share * f + (1 - share) * f / factor)
        return scaled


def llama_config(raw: dict[str, Any], where: str) -> LlamaConfig:
    """Check a config.json (`where` names it in errors). Raises `CheckpointError` for what cannot be split."""
    architectures = raw.get("architectures") or [raw.get("model_type")]
    if architectures not in (["LlamaForCausalLM"], ["llama"]):
        raise CheckpointError(
            f"{where}: cannot refactor architecture {architectures[0]!r}; known: LlamaForCausalLM (dense Llama)"
        )
    for name, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if raw.get(name, wanted) != wanted:
            raise CheckpointError(f"{where}: {name}={raw[name]!r} is not supported, only {wanted!r}")
    try:
        num_heads = int(raw["num_attention_heads"])
        rope = dict(raw.get("rope_parameters") or {})
        return LlamaConfig(
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=num_heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or num_heads),
            head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // num_heads),
            vocab_size=int(raw["vocab_size"]),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(raw.get("rope_scaling") or rope, where),
            max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=raw.get("eos_token_id"),
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: {error.args[0]!r} is missing") from error


def _rope_scaling(scaling: dict[str, Any], where: str) -> dict[str, Any] | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"{where}: rope scaling {kind!r} is not supported; known: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return None
    keys = _LINEAR_KEYS if kind == "linear" else _LLAMA3_KEYS
    return {"rope_type": kind} | {key: scaling[key] for key in keys}
