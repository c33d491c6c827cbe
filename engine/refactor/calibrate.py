"""Learn a plan: run calibration text through the model layer by layer, splitting each layer as it is reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.refactor.corpus import Passages
from engine.refactor.dense import DenseLayer, Rotary, attend, embed
from engine.refactor.perplexity import ffn
from engine.refactor.plan import LayerPlan, RefactorPlan, SplitSettings
from engine.refactor.router import expert_gram, fit_router, left_out_error, router_logits
from engine.refactor.source import DenseSource, fingerprint
from engine.refactor.split import contributions, split_neurons
from kernels.reference import rms_norm

_CLUSTER_TOKENS = 4096  # tokens that neurons are clustered by


@dataclass(frozen=True, slots=True)
class LayerFit:
    """Mean squared error of the FFN output, relative to the layer's output, when experts are left out."""

    router: float  # by the router's choice
    oracle: float  # the smallest contributions
    random: float


@torch.inference_mode()
def learn_plan(
    source: DenseSource,
    texts: list[Passages],
    settings: SplitSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
    seed: int = 0,
) -> tuple[RefactorPlan, list[LayerFit]]:
    """Split the layers of `source`, a fit for each. Memory: one layer, every token's hidden state, a layer's neurons.

    Each layer sees the hidden states that the already split layers before it produce, so that its router learns on
    what it will meet. Raises `ConfigError` when the neurons cannot be cut as `settings` says.
    """
    config = source.config
    settings.expert_size(config.intermediate_size)
    split = settings.split_layers(config.num_hidden_layers)
    rotary = Rotary.build(config, max(text.tokens.shape[1] for text in texts))
    sequences = [row[None] for text in texts for row in embed(source, text.tokens)]  # each [1, T, H]
    generator = torch.Generator().manual_seed(seed)
    layers, fits = [], []
    for index in range(config.num_hidden_layers):
        layer = DenseLayer.load(source, index)
        sequences = [attend(hidden, layer, config, rotary) for hidden in sequences]
        plan = None
        if index in split:
            plan, fit = _split_layer(sequences, layer, config.rms_norm_eps, settings, generator)
            layers.append(plan)
            fits.append(fit)
        for hidden in sequences:
            x = rms_norm(hidden, layer.post_norm, config.rms_norm_eps)
            hidden += ffn(x, layer, plan, settings)
        progress(index + 1, config.num_hidden_layers)
    return RefactorPlan(settings=settings, source_sha256=fingerprint(source), layers=layers).rounded(), fits


def _split_layer(
    sequences: list[Tensor], layer: DenseLayer, eps: float, settings: SplitSettings, generator: torch.Generator
) -> tuple[LayerPlan, LayerFit]:
    hidden = torch.cat([h[0] for h in sequences])  # [N, H]
    inputs = rms_norm(hidden, layer.post_norm, eps)
    neurons = layer.neurons(inputs)  # [N, I]
    # an error counts relative to the layer's output, which the next layer normalises; without this the few tokens
    # with huge hidden states (the first of a sequence) would outweigh all others
    scale = (hidden + neurons @ layer.down.T).norm(dim=1).reciprocal()
    sample = torch.randperm(len(inputs), generator=generator)[:_CLUSTER_TOKENS]
    permutation = split_neurons(contributions(neurons[sample], layer.down, scale[sample]), settings)
    gram = expert_gram(neurons, layer.down, scale, permutation, settings)
    weight, bias = fit_router(inputs, gram)
    candidates = {
        "router": router_logits(inputs, weight, bias),
        "oracle": gram.diagonal(dim1=1, dim2=2),
        "random": torch.rand(len(inputs), settings.num_experts, generator=generator),
    }
    errors = {name: float(left_out_error(x, gram, settings.num_active).mean()) for name, x in candidates.items()}
    return LayerPlan(permutation, weight, bias), LayerFit(**errors)
