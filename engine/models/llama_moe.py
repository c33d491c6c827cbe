"""Llama refactored into a MoE by `foregate refactor` (after Read-ME, arXiv 2410.19123), and dense Llama itself.

Each FFN is an always-on shared expert plus routed experts that cover the rest of its neurons; a chosen expert counts
in full (weight 1), so that with all of them active the model is the dense one. Experts are chosen by a router in each
layer, or by one small model over the token ids that knows all choices before the forward pass begins.
"""

from __future__ import annotations

from engine.errors import CheckpointError
from engine.models.spec import Config, ModelSpec, MoeSpec, PregateSpec, base_fields, num_experts

MODEL_TYPE = "foregate_llama_moe"
_MLP = "model.layers.{layer}.mlp"


def llama_moe(config: Config) -> ModelSpec:
    fields = base_fields(config)
    moe = MoeSpec(
        num_experts=num_experts(config),
        num_active=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        layers=tuple(i for i in range(fields["num_layers"]) if i not in config.get("dense_layers", ())),
        routing="unweighted",
        router=f"{_MLP}.router",
        router_bias=True,
        gate=f"{_MLP}.experts.{{expert}}.gate_proj",
        up=f"{_MLP}.experts.{{expert}}.up_proj",
        down=f"{_MLP}.experts.{{expert}}.down_proj",
        shared_mlp=f"{_MLP}.shared_expert" if config.get("shared_expert_intermediate_size") else None,
    )
    pregate = config.get("pregate")
    return ModelSpec(**fields, moe=moe, pregate=None if pregate is None else PregateSpec(**pregate))


def llama(config: Config) -> ModelSpec:
    if config.get("mlp_bias", False):
        raise CheckpointError("Llama checkpoints with mlp_bias are not supported")
    return ModelSpec(**base_fields(config), moe=None)
