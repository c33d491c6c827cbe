"""Learns the small causal router from recorded routing, and tells how much it finds on requests it did not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engine.path_router import RunningMeans, reduce

_NUM_DIMS = 128  # of a token's embedding that are kept
_HIDDEN = 256
_EPOCHS = 24
_BATCH = 512
_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 0.05
_DROPOUT = 0.1


def learn_path(
    embedding: Tensor,
    token_ids: Sequence[int],
    requests: Sequence[int],
    chosen: Tensor,
    is_held_out: Tensor,
    num_experts: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Embeddings [V, H], tokens and their requests [N] in the order they were computed, chosen [N, L, k].

    -> the router's tensors, as `save_path_router` takes them, and the share of the held-out tokens' experts that were
    among as many foretold ones.
    """
    num_tokens, num_layers, num_active = chosen.shape
    generator = torch.Generator().manual_seed(seed)
    basis = _basis(embedding, token_ids)
    features = torch.from_numpy(RunningMeans(reduce(embedding, basis))(requests, token_ids))
    wanted = torch.zeros(num_tokens, num_layers, num_experts).scatter_(2, chosen, 1.0)
    learned = (~is_held_out).nonzero()[:, 0]
    weights = _first_weights(features.shape[1], wanted[learned].mean(0).reshape(-1), generator)
    optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    num_steps = _EPOCHS * -(-len(learned) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=num_steps)
    for epoch in range(_EPOCHS):
        for rows in learned[torch.randperm(len(learned), generator=generator)].split(_BATCH):
            kept = torch.rand(len(rows), features.shape[1], generator=generator) >= _DROPOUT
            logits = _logits(features[rows] * kept / (1 - _DROPOUT), weights)
            loss = functional.binary_cross_entropy_with_logits(logits, wanted[rows].flatten(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress(epoch + 1, _EPOCHS)
    with torch.no_grad():
        logits = _logits(features[is_held_out], weights).view(-1, num_layers, num_experts)
    truth = wanted[is_held_out]
    recall = float(truth.gather(2, logits.topk(num_active).indices).sum() / truth.sum())
    names = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
    tensors = {name: weight.detach().contiguous() for name, weight in zip(names, weights, strict=True)}
    return {"basis": basis.contiguous(), **tensors}, recall


def _basis(embedding: Tensor, token_ids: Sequence[int]) -> Tensor:
    """The directions [d, H] in which the embeddings of these tokens differ most, each scaled to unit spread."""
    rows = embedding[torch.from_numpy(np.unique(np.asarray(token_ids, dtype=np.int64)))]
    rows = rows * rows.square().mean(1, keepdim=True).add(1e-12).rsqrt()
    _, spread, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    num_dims = min(_NUM_DIMS, len(directions))
    scale = spread[:num_dims] / max(1, len(rows)) ** 0.5
    basis: Tensor = directions[:num_dims] / scale.clamp_min(1e-3)[:, None]
    return basis


def _first_weights(num_features: int, shares: Tensor, generator: torch.Generator) -> list[Tensor]:
    """`shares`: of the tokens that use each expert [L * E], which the output's bias begins with."""
    hidden = torch.randn(_HIDDEN, num_features, generator=generator) * (2.0 / num_features) ** 0.5
    output = torch.randn(len(shares), _HIDDEN, generator=generator) * 0.1 * _HIDDEN**-0.5
    bias = torch.logit(shares.clamp(1e-3, 1 - 1e-3))
    return [weight.requires_grad_() for weight in (hidden, torch.zeros(_HIDDEN), output, bias)]


def _logits(features: Tensor, weights: Sequence[Tensor]) -> Tensor:
    hidden_weight, hidden_bias, output_weight, output_bias = weights
    hidden = (features @ hidden_weight.T + hidden_bias).relu()
    return torch.addmm(output_bias, hidden, output_weight.T)
