"""The plain torch truth of every kernel. Written to be read, not to be fast; tests compare kernels with this alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] normalised by its root mean square in float32, times weight [H]; dtype of x (Zhang, Sennrich 2019)."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, D] by cos, sin [T, D] in the half-split layout of Llama checkpoints (Su et al. 2021)."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None, :] + rotated * sin[:, None, :]


def append_kv(kv_cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write key, value [T, kv_heads, D] to token slots [T] of kv_cache [2, num_slots, kv_heads, D], in place."""
    kv_cache[0].index_copy_(0, slots, key.to(kv_cache.dtype))
    kv_cache[1].index_copy_(0, slots, value.to(kv_cache.dtype))


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    query_spans: list[tuple[int, int]],
    kv_slots: list[Tensor],
    scale: float,
) -> Tensor:
    """Causal grouped-query attention of any mix of chunks and decode rows.

    query [T, heads, D]; kv_cache [2, num_slots, kv_heads, D]; sequence s owns the rows query_spans[s] of query, which
    are the last tokens of the kv_slots[s] [context] slots. Returns [T, heads, D].
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = kv_cache.shape[2]
    out = torch.empty_like(query)
    for (start, end), slots in zip(query_spans, kv_slots, strict=True):
        q = query[start:end].transpose(0, 1)  # [heads, rows, D]
        k = kv_cache[0, slots].to(query.dtype).transpose(0, 1)  # [kv_heads, context, D]
        v = kv_cache[1, slots].to(query.dtype).transpose(0, 1)
        num_rows, context = end - start, len(slots)
        q = q.reshape(num_kv_heads, num_heads // num_kv_heads * num_rows, head_dim)
        scores = (q @ k.transpose(1, 2)).float() * scale  # [kv_heads, group * rows, context]
        if num_rows > 1:
            hidden = torch.ones(num_rows, context, dtype=torch.bool, device=query.device).triu(context - num_rows + 1)
            scores = scores.view(num_kv_heads, -1, num_rows, context).masked_fill(hidden, float("-inf"))
            scores = scores.view(num_kv_heads, -1, context)
        attended = scores.softmax(-1).to(query.dtype) @ v
        out[start:end] = attended.view(num_heads, num_rows, head_dim).transpose(0, 1)
    return out


def route_softmax(logits: Tensor, num_active: int, *, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] -> (ids [T, k] int64, weights [T, k] float32), best first.

    Softmax over all experts, then the k largest; renormalise divides by their sum (Mixtral, Qwen3), else they stay
    as they are (OLMoE).
    """
    probs = logits.float().softmax(-1)
    weights, ids = probs.topk(num_active, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights


def route_unweighted(logits: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] -> the k largest, each with weight 1, as an FFN that was split into experts needs."""
    ids = logits.float().topk(num_active, dim=-1).indices
    return ids, torch.ones(ids.shape, dtype=torch.float32, device=ids.device)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x [n, H], gate and up [I, H], down [H, I] -> silu(x gate^T) * (x up^T) down^T [n, H] (Shazeer 2020)."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def combine(outputs: Tensor, weights: Tensor) -> Tensor:
    """outputs [T, k, H] of each (token, expert) in routing order, weights [T, k] -> [T, H].

    Added in float32 in routing order, one after the other, whatever order the experts were computed in.
    """
    total = outputs[:, 0].float() * weights[:, :1]
    for i in range(1, outputs.shape[1]):
        total = total + outputs[:, i].float() * weights[:, i : i + 1]
    return total.to(outputs.dtype)
