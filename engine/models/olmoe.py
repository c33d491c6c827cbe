"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): many small experts, norms over all query and key heads."""

from __future__ import annotations

from engine.models.spec import Config, ModelSpec, MoeSpec, base_fields, num_experts

_MLP = "model.layers.{layer}.mlp"


def olmoe(config: Config) -> ModelSpec:
    fields = base_fields(config)
    moe = MoeSpec(
        num_experts=num_experts(config),
        num_active=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        layers=tuple(range(fields["num_layers"])),
        routing="softmax_renormalised" if config.get("norm_topk_prob", False) else "softmax",
        router=f"{_MLP}.gate",
        gate=f"{_MLP}.experts.{{expert}}.gate_proj",
        up=f"{_MLP}.experts.{{expert}}.up_proj",
        down=f"{_MLP}.experts.{{expert}}.down_proj",
    )
    clip_qkv = config.get("clip_qkv")
    return ModelSpec(**fields, moe=moe, qk_norm="full", clip_qkv=None if clip_qkv is None else float(clip_qkv))
