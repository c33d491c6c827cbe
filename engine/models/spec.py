"""What a decoder-only model of any family looks like: shapes, switches and weight names. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.errors import CheckpointError, ConfigError

Config = Mapping[str, Any]
Routing = Literal["softmax", "softmax_renormalised", "unweighted"]
ROUTERS = ("auto", "layerwise", "pregated")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding (Su et al. 2021). `type` is default, linear (positions / factor) or llama3 (Llama 3.1)."""

    theta: float
    type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """The experts. Names are templates over {layer} and {expert}, of the modules without '.weight'."""

    num_experts: int
    num_active: int
    intermediate_size: int
    layers: tuple[int, ...]  # which decoder layers have experts
    routing: Routing
    router: str
    gate: str
    up: str
    down: str
    router_bias: bool = False
    shared_mlp: str | None = None  # prefix of an always-on gate_proj, up_proj, down_proj beside the experts


@dataclass(frozen=True, slots=True, kw_only=True)
class PregateSpec:
    """A small causal model over token ids that routes all layers before the forward pass (Read-ME, arXiv 2410.19123).

    Its layers are Llama's, with as many heads as the model has KV heads and of their size, so that its keys and values
    lie in the same blocks. Names are those of Llama under `model.pregate.`; the routers are `routers.{layer}`.
    """

    hidden_size: int
    num_layers: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "intermediate_size"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"config.json: the pre-gate's {name} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model. Weight names beyond the experts' are those of Llama, which all families share."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    tie_word_embeddings: bool
    moe: MoeSpec | None
    qk_norm: Literal["none", "head", "full"] = "none"  # over each head, or over all heads together
    attention_bias: bool = False
    clip_qkv: float | None = None
    dense_mlp: str = "model.layers.{layer}.mlp"  # prefix in layers without experts
    pregate: PregateSpec | None = None  # routes instead of the layers' own routers

    @property
    def num_kv_layers(self) -> int:
        """Layers that have keys and values: the model's, then the pre-gate's."""
        return self.num_layers + (self.pregate.num_layers if self.pregate is not None else 0)

    def with_router(self, name: str) -> ModelSpec:
        """Routed by `layerwise`, `pregated`, or `auto`, the layers' own. Raises `ConfigError` for one it has not."""
        if name not in ROUTERS:
            raise ConfigError(f"unknown router {name!r}; known: {', '.join(ROUTERS)}")
        if name != "pregated":
            return replace(self, pregate=None)
        if self.pregate is None:
            raise ConfigError("this model has no pre-gate: its only router is layerwise")
        return self

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"config.json: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config.json: {self.num_heads} attention heads are not a multiple of {self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config.json: head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.moe is not None and not 1 <= self.moe.num_active <= self.moe.num_experts:
            raise CheckpointError(
                f"config.json: {self.moe.num_active} active of {self.moe.num_experts} experts is not possible"
            )


def base_fields(config: Config) -> dict[str, Any]:
    """The fields of `ModelSpec` that every family spells alike; raises `CheckpointError` for what is not supported."""
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"activation {config['hidden_act']!r} is not supported; known: silu")
    hidden_size, num_heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    max_positions = int(config.get("max_position_embeddings") or 2048)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return {
        "vocab_size": _int(config, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": _int(config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or num_heads),
        "head_dim": int(config.get("head_dim") or hidden_size // num_heads),
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "rope": _rope(config),
        # within its window, windowed attention is full attention; beyond it we do not go
        "max_position_embeddings": min(max_positions, int(window)) if window else max_positions,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "attention_bias": bool(config.get("attention_bias", False)),
    }


def num_experts(config: Config) -> int:
    """Expert count, whichever of its two spellings the config has."""
    return _int(config, "num_experts" if "num_experts" in config else "num_local_experts")


def _int(config: Config, name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be a whole number, got {value!r}")
    return value


def _rope(config: Config) -> RopeSpec:
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, "linear", float(scaling["factor"]))
    if kind == "llama3":
        return RopeSpec(
            theta,
            "llama3",
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    raise CheckpointError(f"rotary embedding of type {kind!r} is not supported; known: default, linear, llama3")
