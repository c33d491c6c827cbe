"""Which neurons are shared and which form each expert, from their activations alone. Deterministic."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.refactor.plan import SplitSettings

_MAX_ROUNDS = 8
_PRICE_STEPS = 200


def contributions(neurons: Tensor, down: Tensor, token_scale: Tensor) -> Tensor:
    """Size of what each neuron adds to each token's hidden state, |a_i| * ||down_i|| * scale [N, I].

    neurons [N, I] activations, down [H, I], token_scale [N]: what a unit of error weighs at each token.
    """
    sizes: Tensor = down.norm(dim=0)
    return neurons.abs() * sizes * token_scale[:, None]


def split_neurons(contribution: Tensor, settings: SplitSettings) -> Tensor:
    """contribution [N, I] -> permutation [I]: the shared neurons, then expert after expert, each in ascending order.

    Shared are those that contribute most on average; the others are clustered by when they contribute.
    """
    num_neurons = contribution.shape[1]
    expert_size = settings.expert_size(num_neurons)
    order = contribution.mean(0).argsort(descending=True, stable=True)
    shared, routed = (
        part.sort().values for part in order.split([settings.shared_size, len(order) - settings.shared_size])
    )
    labels = balanced_clusters(contribution[:, routed].T.contiguous(), settings.num_experts)
    by_expert = labels.argsort(stable=True)  # stable: ascending within an expert
    assert torch.equal(
        labels.bincount(minlength=settings.num_experts), torch.full((settings.num_experts,), expert_size)
    )
    return torch.cat((shared, routed[by_expert]))


def balanced_clusters(points: Tensor, num_clusters: int) -> Tensor:
    """k-means with clusters of equal size: points [n, d] -> labels [n], each of them n / num_clusters times."""
    centres = points[_spread_out(points, num_clusters)]
    labels = torch.full((len(points),), -1)
    for _ in range(_MAX_ROUNDS):
        distances = _squared_distances(points, centres)
        found = _assign_equally(distances)
        if torch.equal(found, labels):
            break
        labels = found
        centres = torch.stack([points[labels == i].mean(0) for i in range(num_clusters)])
    return labels


def _spread_out(points: Tensor, num_chosen: int) -> Tensor:
    """Indices of points far from each other: the farthest from the mean, then always the farthest from those chosen."""
    distances = _squared_distances(points, points.mean(0, keepdim=True))[:, 0]
    chosen: list[int] = []
    for i in range(num_chosen):
        chosen.append(int(distances.argmax()))
        new = _squared_distances(points, points[chosen[-1] :][:1])[:, 0]
        distances = new if i == 0 else torch.minimum(distances, new)
    return torch.tensor(chosen)


def _squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    return points.square().sum(1, keepdim=True) - 2 * points @ centres.T + centres.square().sum(1)


def _assign_equally(costs: Tensor) -> Tensor:
    """costs [n, E] -> cluster of each row, n / E rows each, at nearly the least total cost.

    A price per cluster rises while too many want it (the dual of the assignment problem); what the prices leave uneven
    is settled in order of how much a row would lose by its second choice. Near-linear in n, where the exact solution
    is cubic.
    """
    num_rows, num_clusters = costs.shape
    size = num_rows // num_clusters
    costs = costs - costs.min(dim=1, keepdim=True).values
    costs = costs / costs.median().clamp(min=1e-12)
    prices = torch.zeros(num_clusters)
    for step in range(_PRICE_STEPS):
        wanted = (costs + prices).argmin(1).bincount(minlength=num_clusters)
        prices += 0.5 * (1 - step / _PRICE_STEPS) * (wanted / size - 1)
    costs = costs + prices
    best = costs.sort(stable=True, dim=1)
    regret = best.values[:, min(1, num_clusters - 1)] - best.values[:, 0]
    room = [size] * num_clusters
    labels = [-1] * num_rows
    preferences: list[list[int]] = best.indices.tolist()
    for row in regret.argsort(descending=True, stable=True).tolist():
        labels[row] = next(cluster for cluster in preferences[row] if room[cluster])
        room[labels[row]] -= 1
    return torch.tensor(labels)
