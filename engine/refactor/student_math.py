"""What a student computes, and what is compiled of it: functions of tensors and numbers, one graph for all layers.

Every neuron is computed and those of experts that are not chosen are multiplied by zero, so that the loss tells an
expert left out what it would have been worth (a straight-through gradient, Bengio et al. 2013).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

_MASKED = -1e30
_FAR = 1e-6  # how much an expert far from the threshold moves it


@dataclass(frozen=True, slots=True)
class Geometry:
    """The numbers that all layers share."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    num_experts: int
    shared_size: int
    temperature: float  # of the slope by which a router learns


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _linear(x: Tensor, weight: Tensor, factors: list[Tensor]) -> Tensor:
    """x @ (weight + b @ a)^T in bf16; no factors: the dense model's."""
    y = F.linear(x, weight)
    if factors:
        a, b = (factor.to(torch.bfloat16) for factor in factors)
        y = y + F.linear(F.linear(x, a), b)
    return y


def _attend(
    hidden: Tensor,
    norm: Tensor,
    weights: list[Tensor],
    factors: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    geometry: Geometry,
) -> Tensor:
    num_seqs, length, _ = hidden.shape
    heads, kv_heads, head_dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    x = _norm(hidden, norm, geometry.eps).to(torch.bfloat16)
    qkv = _linear(x, weights[0], factors[:2]).view(num_seqs, length, heads + 2 * kv_heads, head_dim)
    qk, v = qkv[:, :, : heads + kv_heads], qkv[:, :, heads + kv_heads :]
    half = head_dim // 2
    qk = qk * cos + torch.cat((-qk[..., half:], qk[..., :half]), -1) * sin
    q = qk[:, :, :heads].transpose(1, 2)
    k, v = (t.transpose(1, 2).repeat_interleave(heads // kv_heads, 1) for t in (qk[:, :, heads:], v))
    scores = torch.matmul(q * head_dim**-0.5, k.transpose(-1, -2)).float()
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    attended = torch.matmul(scores.masked_fill(~seen, _MASKED).softmax(-1).to(torch.bfloat16), v)
    return hidden + _linear(attended.transpose(1, 2).flatten(2), weights[1], factors[2:4]).float()


def choose(logits: Tensor, num_active: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Router logits [B, T, E] -> 0 or 1 with the slope of a sigmoid at the threshold, the same without, the sigmoid.

    The threshold moves with the logits so that as many stay above it. Were it held still, every expert would be worth
    choosing, all logits would only rise together, and the optimiser would make that common drift its main direction.
    """
    ranked = logits.sort(-1, descending=True).values
    index = num_active.expand(logits.shape[:-1])[..., None]
    last = ranked.gather(-1, index - 1)
    next_ = ranked.gather(-1, index.clamp(max=logits.shape[-1] - 1))
    threshold = ((last + next_) / 2).detach()
    chosen = (logits >= last).float()
    with torch.no_grad():
        near = torch.sigmoid((logits - threshold) / temperature)
        near = near * (1 - near) + _FAR
        near = near / near.sum(-1, keepdim=True)
    middle = (near * logits).sum(-1, keepdim=True)
    slope = torch.sigmoid((logits - middle + (middle - threshold).detach()) / temperature)
    return chosen + slope - slope.detach(), chosen, slope


def split_layer(
    hidden: Tensor,
    norms: list[Tensor],
    weights: list[Tensor],
    factors: list[Tensor],
    router: list[Tensor],
    num_active: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> hidden, unevenness, chosen, logits. Unevenness is 1 where all experts of the batch serve alike."""
    hidden = _attend(hidden, norms[0], weights, factors, cos, sin, geometry)
    x = _norm(hidden, norms[1], geometry.eps)
    logits = F.linear(x, *router)
    if mask is None:
        mask, chosen, slope = choose(logits, num_active, geometry.temperature)
        unevenness = (chosen.mean((0, 1)) * slope.mean((0, 1))).sum() * geometry.num_experts / num_active**2
    else:
        chosen, unevenness = mask, logits.new_zeros(())
    neurons = _neurons(x, weights[2], factors[4:6])
    shared, routed = neurons.split([geometry.shared_size, neurons.shape[-1] - geometry.shared_size], -1)
    expert_size = routed.shape[-1] // geometry.num_experts
    neurons = torch.cat((shared, routed * mask.to(torch.bfloat16).repeat_interleave(expert_size, -1)), -1)
    return hidden + _linear(neurons, weights[3], factors[6:8]).float(), unevenness, chosen, logits


def dense_layer(
    hidden: Tensor, norms: list[Tensor], weights: list[Tensor], cos: Tensor, sin: Tensor, geometry: Geometry
) -> Tensor:
    hidden = _attend(hidden, norms[0], weights, [], cos, sin, geometry)
    neurons = _neurons(_norm(hidden, norms[1], geometry.eps), weights[2], [])
    return hidden + _linear(neurons, weights[3], []).float()


def _neurons(x: Tensor, weight: Tensor, factors: list[Tensor]) -> Tensor:
    gate, up = _linear(x.to(torch.bfloat16), weight, factors).chunk(2, -1)
    return F.silu(gate) * up


def divergence(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, V] -> KL(teacher || student) [n], and its gradient for the student's logits, bf16 [n, V]."""
    ours, theirs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    wanted = theirs.exp()
    return (wanted * (theirs - ours)).sum(-1), (ours.exp() - wanted).to(torch.bfloat16)
