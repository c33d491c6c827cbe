"""Perplexity of the dense model and of its refactored self on the same text, streamed layer by layer side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cache.analysis import Chosen
from engine.errors import ConfigError
from engine.refactor.corpus import Passages
from engine.refactor.dense import DenseLayer, Rotary, attend, embed, token_log_likelihoods
from engine.refactor.healing import healed
from engine.refactor.plan import LayerPlan, RefactorPlan, SplitSettings
from engine.refactor.pregate import PregateModel
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


def chosen_experts(x: Tensor, plan: LayerPlan, settings: SplitSettings, logits: Tensor | None = None) -> Tensor:
    """Normed input [..., H] -> which experts its router chooses, bool [..., E]; or those of the given logits."""
    if logits is None:
        logits = F.linear(x, plan.router_weight, plan.router_bias)
    chosen = torch.zeros(logits.shape, dtype=torch.bool)
    return chosen.scatter_(-1, logits.topk(settings.num_active, dim=-1).indices, True)


def ffn(
    x: Tensor,
    layer: DenseLayer,
    plan: LayerPlan | None,
    settings: SplitSettings,
    logits: Tensor | None = None,
) -> Tensor:
    """Normed input [..., H] -> output of the shared expert plus the chosen ones [..., H], computed with dense weights.

    Neurons of experts that are not chosen are zeroed: the same sum as the MoE's, in another order. Without a plan the
    layer is dense. `logits` [..., E] choose instead of the plan's router.
    """
    if plan is None:
        return F.linear(layer.neurons(x), layer.down)
    chosen = chosen_experts(x, plan, settings, logits).to(x.dtype)
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
    *,
    pregated: bool = False,
) -> list[Perplexity]:
    """One `Perplexity` per text. Memory: one layer and two hidden states of every token.

    pregated: the plan's pre-gate routes, and its logits for every token and layer are in memory too.
    """
    config = source.config
    rotary = Rotary.build(config, max(text.tokens.shape[1] for text in texts))
    split = healed(source, plan.healing)
    dense = [embed(source, text.tokens) for text in texts]
    refactored = [hidden.clone() for hidden in dense]
    logits = _pregate_logits(source, plan, rotary, refactored) if pregated else None
    routing: list[list[Tensor]] = [[] for _ in texts]  # of each text a layer after the other, [B, T, E]
    num_split = 0
    for index, layer_plan in enumerate(plan.by_layer(config.num_hidden_layers)):
        layer = DenseLayer.load(source, index)
        for hidden in (row[None] for text in dense for row in text):
            hidden.copy_(attend(hidden, layer, config, rotary))
            x = rms_norm(hidden, layer.post_norm, config.rms_norm_eps)
            hidden += ffn(x, layer, None, plan.settings)
        layer = DenseLayer.load(split, index)
        for i, (states, routes) in enumerate(zip(refactored, routing, strict=True)):
            chosen = []
            for j, hidden in enumerate(row[None] for row in states):
                hidden.copy_(attend(hidden, layer, config, rotary))
                x = rms_norm(hidden, layer.post_norm, config.rms_norm_eps)
                given = None
                if logits is not None and layer_plan is not None:
                    given = logits[i][j : j + 1, :, num_split]
                hidden += ffn(x, layer, layer_plan, plan.settings, given)
                if layer_plan is not None:
                    chosen.append(chosen_experts(x, layer_plan, plan.settings, given))
            if chosen:
                routes.append(torch.cat(chosen))
        num_split += layer_plan is not None
        progress(index + 1, config.num_hidden_layers)
    return [
        Perplexity(text.name, _perplexity(source, a, text), _perplexity(split, b, text), _by_sequence(text, routes))
        for text, a, b, routes in zip(texts, dense, refactored, routing, strict=True)
    ]


def _pregate_logits(source: DenseSource, plan: RefactorPlan, rotary: Rotary, embedded: list[Tensor]) -> list[Tensor]:
    """Router logits [B, T, L, E] of the layers that are split, for each text's embeddings [B, T, H]."""
    if plan.pregate is None:
        raise ConfigError("the plan has no pre-gate")
    config, settings = source.config, plan.settings
    model = PregateModel(
        config, plan.pregate.spec, settings.num_experts, settings.split_layers(config.num_hidden_layers)
    )
    model.load_state_dict({name: tensor.float() for name, tensor in plan.pregate.parameters.items()})
    return [torch.cat([model(row[None], rotary) for row in hidden]) for hidden in embedded]


def _by_sequence(text: Passages, routes: list[Tensor]) -> list[Chosen]:
    lengths = [int(scored.nonzero()[-1]) + 2 if scored.any() else 0 for scored in text.scored]
    chosen = torch.stack(routes, dim=2)  # [B, T, L, E]
    return [row[:length].numpy() for row, length in zip(chosen, lengths, strict=True)]


def _perplexity(source: DenseSource, hidden: Tensor, text: Passages) -> float:
    total = 0.0
    for likelihoods, scored in zip(token_log_likelihoods(source, hidden, text.tokens), text.scored, strict=True):
        total += float(likelihoods[scored].sum(dtype=torch.float64))
    return math.exp(-total / int(text.scored.sum()))
