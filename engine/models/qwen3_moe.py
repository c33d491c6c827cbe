"""Qwen3-MoE (arXiv 2505.09388): small experts, norms over each query and key head, some layers may be dense."""

from __future__ import annotations

from engine.models.spec import Config, ModelSpec, MoeSpec, base_fields, num_experts

_MLP = "model.layers.{layer}.mlp"


def qwen3_moe(config: Config) -> ModelSpec:
    fields = base_fields(config)
    dense_layers = config.get("mlp_only_layers") or ()
    step = config.get("decoder_sparse_step", 1)
    layers = tuple(
        layer for layer in range(fields["num_layers"]) if layer not in dense_layers and (layer + 1) % step == 0
    )
    moe = MoeSpec(
        num_experts=num_experts(config),
        num_active=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        layers=layers,
        routing="softmax_renormalised" if config.get("norm_topk_prob", False) else "softmax",
        router=f"{_MLP}.gate",
        gate=f"{_MLP}.experts.{{expert}}.gate_proj",
        up=f"{_MLP}.experts.{{expert}}.up_proj",
        down=f"{_MLP}.experts.{{expert}}.down_proj",
    )
    return ModelSpec(**fields, moe=moe if layers else None, qk_norm="head")
