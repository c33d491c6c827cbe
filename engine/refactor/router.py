"""A linear router per layer, fitted to what each expert would contribute. Knows tensors, no checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engine.refactor.plan import SplitSettings

_RIDGE = 1e-2  # of the mean variance of the inputs
_CHUNK = 2048  # tokens whose expert outputs [tokens, E, H] are in memory at once


def expert_gram(
    neurons: Tensor, down: Tensor, token_scale: Tensor, permutation: Tensor, settings: SplitSettings
) -> Tensor:
    """Inner products of the experts' outputs at each token, scaled [N, E, E].

    neurons [N, I], down [H, I], token_scale [N]. Its diagonal is each expert's squared contribution; d^T G d is the
    squared error of leaving out the experts marked in d.
    """
    routed = permutation[settings.shared_size :]
    weights = down[:, routed].unflatten(1, (settings.num_experts, -1)).permute(1, 2, 0)  # [E, size, H]
    grams = []
    for part, scale in zip(neurons.split(_CHUNK), token_scale.split(_CHUNK), strict=True):
        grouped = (part[:, routed] * scale[:, None]).unflatten(1, (settings.num_experts, -1)).transpose(0, 1)
        outputs = torch.bmm(grouped, weights).transpose(0, 1)  # [n, E, H]
        grams.append(outputs @ outputs.transpose(1, 2))
    return torch.cat(grams)


def ridge_router(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares with a small penalty: inputs [N, H], targets [N, E] -> weight [E, H], bias [E] (float32)."""
    mean_input, mean_target = inputs.mean(0), targets.mean(0)
    centred = inputs - mean_input
    covariance = (centred.T @ centred).double()
    penalty = _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    weight = torch.linalg.solve(covariance + penalty, (centred.T @ (targets - mean_target)).double()).T.float()
    return weight.contiguous(), mean_target - weight @ mean_input


def left_out_error(logits: Tensor, gram: Tensor, num_active: int) -> Tensor:
    """Squared error at each token [N] when only the `num_active` experts of largest logit [N, E] are computed."""
    left_out = torch.ones_like(logits).scatter_(1, logits.topk(num_active, dim=1).indices, 0.0)
    return torch.einsum("ne,nef,nf->n", left_out, gram, left_out)


def fit_router(inputs: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """inputs [N, H], gram [N, E, E] -> router weight [E, H], bias [E], foretelling the log norm of its output.

    Logarithms: which of two experts is larger is a matter of ratios, and a few huge tokens do not rule the fit.
    """
    squared_norms = gram.diagonal(dim1=1, dim2=2)
    floor = 1e-6 * squared_norms.mean().clamp(min=1e-30)  # an expert may be silent at a token
    return ridge_router(inputs, 0.5 * squared_norms.clamp(min=floor).log())


def router_logits(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[N, H] -> [N, E]."""
    return F.linear(inputs, weight, bias)
