"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): top-2 of 8 wide experts, weights renormalised."""

from __future__ import annotations

from engine.models.spec import Config, ModelSpec, MoeSpec, base_fields, num_experts

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"


def mixtral(config: Config) -> ModelSpec:
    fields = base_fields(config)
    moe = MoeSpec(
        num_experts=num_experts(config),
        num_active=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        layers=tuple(range(fields["num_layers"])),
        routing="softmax_renormalised",
        router="model.layers.{layer}.block_sparse_moe.gate",
        gate=f"{_EXPERT}.w1",
        up=f"{_EXPERT}.w3",
        down=f"{_EXPERT}.w2",
    )
    return ModelSpec(**fields, moe=moe)
