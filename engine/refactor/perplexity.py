"""Perplexity of the dense model and of its refactored self on the same text, streamed layer by layer side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cache.analysis import Chosen
from engine.refactor.corpus import Passages
from engine.refactor.dense import DenseLayer, Rotary, attend, embed, token_log_likelihoods
from engine.refactor.healing import healed
from engine.refactor.plan import LayerPlan, RefactorPlan, SplitSettings
from engine.refactor.source import DenseSource
from kernels.reference import rms_norm


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood per scored token."""

    name: str
    dense: float
    refactored: float
    routing: list[Chosen]  # which experts each token used, [T, L, E] of each sequence, padding left out

    @property
    def ratio(self) -> float:
        return self.refactored / self.dense


def chosen_experts(x: Tensor, plan: LayerPlan, settings: SplitSettings) -> Tensor:
    """Normed input [..., H] -> which experts its router chooses, bool [..., E]."""
    logits = F.linear(x, plan.router_weight, plan.router_bias)
    chosen = torch.zeros(logits.shape, dtype=torch.bool)
    return chosen.scatter_(-1, logits.topk(settings.num_active, dim=-1).indices, True)


def ffn(x: Tensor, layer: DenseLayer, plan: LayerPlan | None, settings: SplitSettings) -> Tensor:
    """Normed input [..., H] -> output of the shared expert plus the chosen ones [..., H], computed with dense weights.

    Neurons of experts that are not chosen are zeroed: the same sum as the MoE's, in another order. Without a plan the
    layer is dense.
    """
    if plan is None:
        return F.linear(layer.neurons(x), layer.down)
    chosen = chosen_experts(x, plan, settings).to(x.dtype)
    routed = plan.permutation[settings.shared_size :]
    active = torch.ones(*x.shape[:-1], len(plan.permutation))
    active[..., routed] = chosen.repeat_interleave(len(routed) // settings.num_experts, dim=-1)
    return F.linear(layer.neurons(x) * active, layer.down)


@torch.inference_mode()
def perplexities(
    source: DenseSource,
    plan: RefactorPlan,
    texts: list[Passages],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Perplexity]:
    """One `Perplexity` per text. Memory: one layer and two hidden states of every token."""
    config = source.config
    rotary = Rotary.build(config, max(text.tokens.shape[1] for text in texts))
    split = healed(source, plan.healing)
    dense = [embed(source, text.tokens) for text in texts]
    refactored = [hidden.clone() for hidden in dense]
    routing: list[list[Tensor]] = [[] for _ in texts]  # of each text a layer after the other, [B, T, E]
    for index, layer_plan in enumerate(plan.by_layer(config.num_hidden_layers)):
        layer = DenseLayer.load(source, index)
        for hidden in (row[None] for text in dense for row in text):
            hidden.copy_(attend(hidden, layer, config, rotary))
            x = rms_norm(hidden, layer.post_norm, config.rms_norm_eps)
            hidden += ffn(x, layer, None, plan.settings)
        layer = DenseLayer.load(split, index)
        for states, routes in zip(refactored, routing, strict=True):
            chosen = []
            for hidden in (row[None] for row in states):
                hidden.copy_(attend(hidden, layer, config, rotary))
                x = rms_norm(hidden, layer.post_norm, config.rms_norm_eps)
                hidden += ffn(x, layer, layer_plan, plan.settings)
                if layer_plan is not None:
                    chosen.append(chosen_experts(x, layer_plan, plan.settings))
            if chosen:
                routes.append(torch.cat(chosen))
        progress(index + 1, config.num_hidden_layers)
    return [
        Perplexity(text.name, _perplexity(source, a, text), _perplexity(split, b, text), _by_sequence(text, routes))
        for text, a, b, routes in zip(texts, dense, refactored, routing, strict=True)
    ]


def _by_sequence(text: Passages, routes: list[Tensor]) -> list[Chosen]:
    lengths = [int(scored.nonzero()[-1]) + 2 if scored.any() else 0 for scored in text.scored]
    chosen = torch.stack(routes, dim=2)  # [B, T, L, E]
    return [row[:length].numpy() for row, length in zip(chosen, lengths, strict=True)]


def _perplexity(source: DenseSource, hidden: Tensor, text: Passages) -> float:
    total = 0.0
    for likelihoods, scored in zip(token_log_likelihoods(source, hidden, text.tokens), text.scored, strict=True):
        total += float(likelihoods[scored].sum(dtype=torch.float64))
    return math.exp(-total / int(text.scored.sum()))
